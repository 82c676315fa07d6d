"""The Pyro engine: the one file that reads Pyro traces.

:class:`Loss` is a ``pyro.infer.ELBO``; hand it to ``pyro.infer.SVI`` with any model and guide.
:class:`Program` wraps a model and a guide for the harness.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.torch import Independent
from pyro.infer import ELBO as PyroELBO
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.util import site_is_subsample
from torch.distributions import kl_divergence, transform_to

from elbozoo.inference.arrays import plates_first
from elbozoo.inference.enumeration import (
    Marginal,
    Placed,
    check_summed_out,
    joint_states,
    marginal_terms,
    refuse_summed_out,
)
from elbozoo.inference.errors import InvalidArgument, Refused, must
from elbozoo.inference.objectives import Objective
from elbozoo.inference.terms import (
    Choice,
    Draw,
    Site,
    Terms,
    check_drawn_for,
    check_made_of,
    own_parameters,
    places_of_data,
)
from elbozoo.inference.weights import check_names

_PARTICLES = "num_particles_vectorized"  # the name Pyro's own losses give this plate


# --- reading traces ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Static facts about a program, the same for every particle."""

    dims: tuple[int, ...]  # dims of the plates that every site shares
    scale: float
    joint: bool
    estimated: str  # why the weight is not one; empty where it is
    data_per_entry: float


def _samples(trace: Any) -> dict[str, Any]:
    """Sample statements: neither subsample indices nor ``pyro.deterministic``, which Pyro records as samples too."""
    nodes = trace.nodes.items()
    return {
        n: s
        for n, s in nodes
        if s["type"] == "sample" and not site_is_subsample(s) and not s["infer"].get("_deterministic")
    }


def _recorded(trace: Any) -> dict[str, torch.Tensor]:
    """What a program records with ``pyro.deterministic``, spread over the plates that it is in."""
    recorded = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and s["infer"].get("_deterministic")}
    out = {}
    for name, site in recorded.items():
        value, event_dim = site["value"], site["fn"].event_dim
        out[name] = value.expand(site["fn"].batch_shape + value.shape[value.dim() - event_dim :])
    return out


def _frames(site: Any) -> frozenset[tuple[str, int, int, int]]:
    return frozenset(
        (f.name, f.dim, f.size, f.full_size or f.size)
        for f in site["cond_indep_stack"]
        if f.vectorized and f.name != _PARTICLES
    )


def _layout(model_trace: Any, guide_trace: Any) -> _Layout:
    everything = [*_samples(model_trace).values(), *_samples(guide_trace).values()]
    shared = frozenset.intersection(*map(_frames, everything)) if everything else frozenset()
    scale = 1.0
    for _, _, size, full in shared:
        scale *= full / size
    particle_dims = int(any(f.name == _PARTICLES for s in everything for f in s["cond_indep_stack"]))  # the leftmost
    unshared = not shared and any(_frames(s) or len(s["fn"].batch_shape) > particle_dims for s in everything)
    latent, observed = (
        frozenset().union(*(_frames(s) for s in everything if s["is_observed"] is seen)) for seen in (False, True)
    )
    looped = _looped_size(everything)  # for i in pyro.plate(...): a site a datum, all in one weight
    joint = unshared or looped > 1 or bool(latent & observed - shared)
    data_per_entry = 1.0 if shared else max(looped, _data_size(model_trace, particle_dims))
    estimated = _why_estimated(everything, _samples(guide_trace), shared)
    return _Layout(tuple(sorted(d for _, d, _, _ in shared)), scale, joint, estimated, data_per_entry)


def _is_masked_out(fn: Any) -> bool:
    """Whether its densities count nowhere."""
    fn = _strip(fn)[0]
    return isinstance(fn, MaskedDistribution) and (fn._mask is False or _is_masked_out(fn.base_dist))


def _why_estimated(everything: list[Any], drawn: dict[str, Any], shared: frozenset[Any]) -> str:
    """What of the log weight is an estimate; empty for a weight."""
    for name, site in drawn.items():
        if site["mask"] is False or _is_masked_out(site["fn"]):
            return f"site '{name}', which is masked out"
    for site in everything:
        for name, dim, size, full in _frames(site):
            if shared and (name, dim, size, full) not in shared and full != size:
                return f"plate '{name}', which is subsampled beside the data's"
    return ""


def _looped_size(sites: list[Any]) -> float:
    """Entries of the largest plate that a program loops over."""
    sizes = [float(f.full_size or f.size) for s in sites for f in s["cond_indep_stack"] if not f.vectorized]
    return max(sizes, default=1.0)


def _data_size(model_trace: Any, particle_dims: int) -> float:
    """Full size of the largest stack of plates around an observed site (of its batch where there is no plate)."""
    sizes = [1.0]
    for site in _samples(model_trace).values():
        if site["is_observed"]:
            full = [f[3] for f in _frames(site)]
            sizes.append(float(np.prod(full or tuple(site["fn"].batch_shape)[particle_dims:] or (1,))))
    return max(sizes)


def _strip(fn: Any) -> tuple[Any, int]:
    """The distribution inside ``Independent`` and the number of event dims it reinterpreted."""
    count = 0
    while isinstance(fn, Independent | torch.distributions.Independent):
        fn, count = fn.base_dist, count + fn.reinterpreted_batch_ndims
    return fn, count


def _scale_and_mask(x: torch.Tensor, site: Any, layout: _Layout, event_ndim: int) -> torch.Tensor:
    if site["mask"] is not None:
        mask = site["mask"]
        if isinstance(mask, torch.Tensor):
            mask = mask.reshape(tuple(mask.shape) + (1,) * event_ndim)
        x = torch.where(mask, x, x.new_zeros(())) if isinstance(mask, torch.Tensor) else x * float(mask)
    scale = site["scale"]
    if isinstance(scale, torch.Tensor):
        scale = scale.reshape(tuple(scale.shape) + (1,) * event_ndim)
    elif scale == layout.scale:
        return x
    return x * (scale / layout.scale)


def _unmasked(fn: Any) -> Any:
    """The distribution without its masks; itself where it has none."""
    if isinstance(fn, MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, Independent | torch.distributions.Independent):
        base = _unmasked(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def _is_plain(site: Any, layout: _Layout) -> bool:
    """No scale but the shared plates', and no mask."""
    scaled = isinstance(site["scale"], torch.Tensor) or site["scale"] != layout.scale
    return not scaled and site["mask"] is None and _unmasked(site["fn"]) is site["fn"]


def _score(site: Any, layout: _Layout, particle_dim: int | None) -> torch.Tensor:
    """The log density of the value as it was drawn, ``(K, *P)``: no scale, no mask."""
    if _is_plain(site, layout):
        return _log_prob(site, layout, particle_dim)[0].sum(dim=-1)
    return _lead(_unmasked(site["fn"]).log_prob(site["value"]), 0, layout, particle_dim).sum(dim=-1)


def _log_prob(site: Any, layout: _Layout, particle_dim: int | None) -> tuple[torch.Tensor, bool]:
    """Per-dimension log density ``(K, *P, D)``, less the shared plates' scale, and whether it factorises."""
    fn, factors = _strip(site["fn"])
    log_prob = _scale_and_mask(_density(fn, site["value"]), site, layout, factors)
    return _lead(log_prob, factors, layout, particle_dim), factors > 0 or site["fn"].event_dim == 0


def _density(fn: Any, value: torch.Tensor) -> torch.Tensor:
    """``fn.log_prob(value)``; a one-hot distribution's is continued linearly between the states, not rounded."""
    if isinstance(fn, MaskedDistribution):
        if fn._mask is False:  # what counts nowhere need not have a density that can be worked out
            shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
            return value.new_zeros(shape)
        log_prob = _density(fn.base_dist, value)
        return torch.where(torch.as_tensor(fn._mask, device=log_prob.device), log_prob, log_prob.new_zeros(()))
    if isinstance(fn, dist.OneHotCategorical) and not fn._validate_args:
        return (value * fn.logits.clamp(min=torch.finfo(value.dtype).min)).sum(dim=-1)
    return fn.log_prob(value)


def _lead(x: torch.Tensor, event_ndim: int, layout: _Layout, particle_dim: int | None) -> torch.Tensor:
    """``(K, *P, D)``: particles first (added where there is no particle plate), shared plates, the rest."""
    dims = layout.dims if particle_dim is None else (particle_dim, *layout.dims)
    x = plates_first(x, x.dim() - event_ndim, dims)
    return x[None] if particle_dim is None else x


def _analytic_kl(
    guide_site: Any, model_site: Any, layout: _Layout, particle_dim: int | None
) -> dict[str, torch.Tensor]:
    """``KL(q || p)`` ``(K, *P)``, and its terms ``(K, *P, D)`` where both factorise alike; empty: no closed form."""
    (q, q_factors), (p, p_factors) = _strip(guide_site["fn"]), _strip(model_site["fn"])
    factors = q_factors if q_factors == p_factors else 0
    if factors == 0:
        q, p = guide_site["fn"], model_site["fn"]
    same_scale = guide_site["scale"] is model_site["scale"] or (
        not isinstance(guide_site["scale"], torch.Tensor) and guide_site["scale"] == model_site["scale"]
    )
    if not same_scale or guide_site["mask"] is not model_site["mask"]:
        return {}
    # torch's registry has formulas that forget a Delta's own log density, a distribution's mask, the support of a
    # continuous Bernoulli; the samples are exact
    if isinstance(q, Delta | dist.ContinuousBernoulli) or any(
        _unmasked(s["fn"]) is not s["fn"] for s in (guide_site, model_site)
    ):
        return {}
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        return {}
    kl = _lead(_scale_and_mask(kl, model_site, layout, factors), factors, layout, particle_dim)
    factorises = factors or guide_site["fn"].event_dim == 0
    return {"kl": kl.sum(dim=-1)} | ({"kl_terms": kl} if factorises else {})


def _kl_valid(name: str, model_trace: Any, guide_trace: Any) -> bool:
    """Everything the model's site may depend on was drawn before it in the guide.

    Every latent that precedes the site in the model counts as a possible parent: sufficient, never wrong, and it
    sees a bottom-up guide.
    """
    order = list(guide_trace.nodes)
    before = order[: order.index(name)]
    for other, site in _samples(model_trace).items():
        if other == name:
            return True
        if not site["is_observed"] and other not in before:
            return False
    return False


def _marginalised(
    traced: Any, model: Callable, args: tuple, kwargs: Mapping[str, Any], given: Mapping[str, Any], guide_trace: Any
) -> Any:
    """The model's trace with the sites summed out that ``infer={"enumerate": "parallel"}`` marks and no guide draws.

    Each later site stands in it for what it adds to the marginal (:func:`marginal_terms`).

    Raises: Refused for what cannot be summed out so, and for too many states.
    """
    samples = _samples(traced)
    names = [n for n, s in samples.items() if _is_summed_out(s) and n not in guide_trace.nodes]
    if not names:
        return traced
    placed = {n: _placed(samples[n]) for n in list(samples)[list(samples).index(names[0]) :]}
    check_summed_out(placed, names)
    states = joint_states({n: placed[n].site for n in names}, "the sites that the model sums out")

    def log_probs(index: int) -> dict[str, torch.Tensor]:
        drawn = {
            n: (0 * samples[n]["value"] + torch.as_tensor(v[index], device=samples[n]["value"].device)).to(
                samples[n]["value"]
            )
            for n, v in states.items()
        }
        with poutine.block(), kept_buffers(owners(model)), _Replay({**given, **drawn}):
            found = _samples(poutine.trace(model).get_trace(*args, **kwargs))
        return {n: _masked_log_prob(found[n]) for n in placed}

    each = [log_probs(index) for index in range(len(states[names[0]]))]
    joined = {n: torch.stack(torch.broadcast_tensors(*(state[n] for state in each))) for n in placed}
    out = traced.copy()
    for name in names:
        out.remove_node(name)
    for name, log_prob in marginal_terms(joined, names, placed[names[0]].dims).items():
        out.nodes[name] = {**traced.nodes[name], "fn": Marginal(traced.nodes[name]["fn"], log_prob)}
    return out


def _is_summed_out(site: Any) -> bool:
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def _placed(site: Any) -> Placed:
    base, fn = _strip(site["fn"])[0], site["fn"]
    facts = Site(guide_family=type(base).__name__, event_shape=tuple(fn.event_shape), num_classes=_num_classes(base))
    plates = frozenset((f.name, f.dim) for f in site["cond_indep_stack"] if f.vectorized)
    return Placed(facts, plates, tuple(fn.batch_shape), site["scale"])


def _masked_log_prob(site: Any) -> torch.Tensor:
    fn, factors = _strip(site["fn"])
    log_prob = _density(fn, site["value"])
    log_prob = log_prob.sum(dim=list(range(-factors, 0))) if factors else log_prob
    if site["mask"] is None:
        return log_prob
    return torch.where(torch.as_tensor(site["mask"], device=log_prob.device), log_prob, log_prob.new_zeros(()))


def _check_match(model_trace: Any, guide_trace: Any) -> None:
    model, guide = _samples(model_trace), _samples(guide_trace)
    for name, site in model.items():
        if not site["is_observed"] and name not in guide:
            raise must(
                "guide",
                "draw every latent site of the model",
                f"no site '{name}'",
                f"Add pyro.sample('{name}', …) to the guide",
            )
    for name, site in guide.items():
        if site["infer"].get("is_auxiliary") or (site["is_observed"] and name not in model):
            continue
        if name not in model:
            raise must(
                "guide",
                "draw only latent sites of the model",
                f"'{name}'",
                "Mark an auxiliary site with infer={'is_auxiliary': True}",
            )
        if site["is_observed"] or model[name]["is_observed"]:
            raise must(
                "guide",
                "draw only latent sites of the model",
                f"the observed site '{name}'",
                "Remove it from the guide",
            )


# --- from traces to terms ---------------------------------------------------------------------------------------


class _Replay(poutine.messenger.Messenger):
    """Give latent and subsample sites these values.

    With ``draw_first`` they are drawn all the same and then replaced, so that random numbers are used up as before; a
    value then only needs as many entries as the drawn one.
    """

    def __init__(self, values: Mapping[str, torch.Tensor], draw_first: bool = False):
        super().__init__()
        self.values, self.draw_first = values, draw_first

    def _pyro_sample(self, msg: Any) -> None:
        if not self.draw_first and msg["name"] in self.values and not msg["is_observed"]:
            if not site_is_subsample(msg):
                check_drawn_for(msg["name"], tuple(self.values[msg["name"]].shape), tuple(msg["fn"].event_shape))
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.draw_first and msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]].reshape_as(msg["value"]).to(msg["value"].dtype)


class _Choose(poutine.messenger.Messenger):
    """Give every latent site of the guide the value that an estimator chooses for it.

    Args:
        choose: the estimator's function.
        drawn: the values of the first run, by site.
        given: numbers for the estimator, by site.
    """

    def __init__(self, choose: Callable[[Draw], Choice], drawn: Mapping[str, torch.Tensor], given: Mapping[str, Any]):
        super().__init__()
        self.choose, self.drawn, self.given = choose, drawn, given
        self.choices: dict[str, Choice] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] or site_is_subsample(msg) or msg["infer"].get("_deterministic"):
            return
        name, base = msg["name"], _strip(msg["fn"])[0]
        logits = _logits(base)
        like = msg["value"] if logits is None else logits
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()

        def uniform() -> torch.Tensor:
            return torch.rand(like.shape, dtype=dtype, device=like.device).clamp(min=torch.finfo(dtype).tiny)

        family, event_ndim = type(base).__name__, msg["fn"].event_dim
        drawn, given = self.drawn.get(name), self.given.get(name)
        draw = Draw(name, family, logits, msg["value"], drawn, given, uniform, event_ndim)
        self.choices[name] = choice = self.choose(draw)
        msg["value"] = choice.value
        if choice.logits is not None:
            msg["fn"] = _with_logits(msg["fn"], choice.logits)


def _with_logits(fn: Any, logits: torch.Tensor) -> Any:
    """A Bernoulli or a OneHotCategorical with other logits."""
    base, count = _strip(fn)
    family = dist.Bernoulli if isinstance(base, dist.Bernoulli) else dist.OneHotCategorical
    return family(logits=logits, validate_args=False).to_event(count)


def _logits(fn: Any) -> Any:
    """The normalised logits of a Bernoulli or a categorical distribution; None for any other."""
    known = isinstance(fn, dist.Bernoulli | dist.Categorical | dist.OneHotCategorical)
    return fn.logits if known else None


def _num_classes(fn: Any) -> int:
    """States of one entry."""
    logits = _logits(fn)
    return 0 if logits is None else 2 if isinstance(fn, dist.Bernoulli) else logits.shape[-1]


@contextmanager
def _rng_of(run: _Run) -> Iterator[None]:
    """The random state that ``run``'s guide started from: its dropout masks must be drawn again as they were."""
    with torch.random.fork_rng(devices=_gpus()):
        for i, state in enumerate(run.rng):
            torch.cuda.set_rng_state(state, i - 1) if i else torch.set_rng_state(state)
        yield


def _gpus() -> list[int]:
    """GPUs whose random state there is to keep."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


def owners(*fns: Callable) -> list[torch.nn.Module]:
    """The modules that these callables are, or are methods of."""
    found: list[torch.nn.Module] = []
    for fn in fns:
        owner = fn if isinstance(fn, torch.nn.Module) else getattr(fn, "__self__", None)
        if isinstance(owner, torch.nn.Module) and all(owner is not m for m in found):
            found.append(owner)
    return found


def _refuse_dropout(module: torch.nn.Module) -> None:
    """A guide that runs again draws other masks: the first draw would be held against another distribution's odds."""
    for part in module.modules():
        if isinstance(part, torch.nn.modules.dropout._DropoutNd) and part.training and part.p > 0:
            todo = "Use gradient=ScoreFunction() or VIMCO(), or train without dropout"
            raise must("the program", "have no dropout under a gradient that runs it again", repr(part), todo, Refused)


@contextmanager
def _frozen_parameters(trace: Any, modules: list[torch.nn.Module]) -> Iterator[None]:
    """No gradient into any parameter of ``modules``, or that ``trace`` names (``pyro.module``'s among them)."""
    parameters = [*_leaves(trace), *(p for module in modules for p in module.parameters())]
    leaves = {id(p): p for p in parameters if p.requires_grad}
    try:
        for p in leaves.values():
            p.requires_grad_(False)
        with warnings.catch_warnings():  # pyro.module remarks on every parameter without a gradient
            warnings.filterwarnings("ignore", message=".*was not registered in the param store", category=UserWarning)
            yield
    finally:
        for p in leaves.values():
            p.requires_grad_(True)


def _leaves(trace: Any) -> list[torch.Tensor]:
    values = [s["value"] for s in trace.nodes.values() if s["type"] == "param"]
    return [v.unconstrained() if hasattr(v, "unconstrained") else v for v in values]


@dataclass
class _Run:
    """One guide and model run (of one particle, or of all under a particle plate)."""

    guide_trace: Any
    model_trace: Any
    values: dict[str, torch.Tensor]  # as drawn
    aliases: dict[str, torch.Tensor]  # the same values as the model and the frozen guide see them: hooks go here
    subsamples: dict[str, torch.Tensor]
    rng: list[torch.Tensor]  # random state before the guide ran: the CPU's, then each GPU's


def _run(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], given: Mapping[str, torch.Tensor]
) -> _Run:
    """One run of guide and model, with subsample indices (and latents, where they are not to be drawn) as given."""
    rng = [torch.get_rng_state(), *(torch.cuda.get_rng_state(i) for i in _gpus())]
    with _Replay(given, draw_first=True):  # as a rerun does: random numbers are used up alike
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    nodes: dict[str, Any] = dict(guide_trace.nodes)
    drawn = {n: s["value"] for n, s in nodes.items() if s["type"] == "sample" and site_is_subsample(s)}
    values = {n: s["value"] for n, s in _samples(guide_trace).items() if not s["is_observed"]}
    aliases = {n: v.view_as(v) for n, v in values.items()}
    with _Replay({**drawn, **aliases}):
        model_trace = poutine.trace(model).get_trace(*args, **kwargs)
    model_trace = _marginalised(model_trace, model, args, kwargs, {**drawn, **aliases}, guide_trace)
    _check_match(model_trace, guide_trace)
    return _Run(guide_trace, model_trace, values, aliases, drawn, rng)


def particles(
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    analytic_kl: bool = False,
    step: Any = 0,
    nesting: int | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> Terms:
    r"""Run guide and model for ``num_particles`` particles.

    Args:
        values: latents ``(K, …)`` by site in place of the guide's draws: the densities are theirs, and differentiable
            in them.
        nesting: the particles sit in a plate left of that many of the program's (see :func:`particle_plate`), which
            must broadcast over leading dims; where it is None the program runs once a particle.

    Returns: the :class:`Terms`, with shapes ``(K, *P)``.
    """
    kwargs = dict(kwargs or {})
    particle_dim, modules = None, owners(model, guide)
    programs = model, guide
    if num_particles > 1 and nesting is not None:
        particle_dim = -1 - nesting
        plate = pyro.plate(_PARTICLES, num_particles, dim=particle_dim)
        model, guide = plate(model), plate(guide)
    together = particle_dim is not None

    def given(k: int) -> dict[str, torch.Tensor]:
        return {} if values is None else {n: v if together else v[k] for n, v in values.items()}

    buffers = _buffers(modules)
    runs = [_run(model, guide, args, kwargs, given(0))]
    while not together and len(runs) < num_particles:
        with kept_buffers(modules, buffers):
            runs.append(_run(model, guide, args, kwargs, runs[0].subsamples | given(len(runs))))
    layout = _layout(runs[0].model_trace, runs[0].guide_trace)

    def rerun_guide(run: _Run, values: Mapping[str, torch.Tensor]) -> Any:
        given = _Replay({**run.subsamples, **values}, draw_first=True)
        with poutine.block(), _rng_of(run), kept_buffers(modules, buffers), given:
            return poutine.trace(guide).get_trace(*args, **kwargs)

    def build(guide_traces: list[Any], kl: bool, densities: Sequence[Mapping[str, Any]]) -> Terms:
        parts = [
            _site_arrays(guide, run.model_trace, layout, particle_dim, kl, known)
            for guide, run, known in zip(guide_traces, runs, densities, strict=True)
        ]
        return _terms(parts, runs, layout, step)

    hooked: list[bool] = []

    def refreeze(ratio: torch.Tensor | None) -> Terms:
        if ratio is not None:
            if hooked:
                todo = "Read terms anew for a second gradient"
                raise must("terms", "be differentiated once", "a second surrogate that rescales their paths", todo)
            hooked.append(True)
            ratio = ratio.detach()
            for k, run in enumerate(runs):
                _hook(run, ratio if particle_dim is not None else ratio[k], layout, particle_dim)
        with ExitStack() as stack:
            for run in runs:  # the model's too: a guide may share them, under names that the store has for others
                stack.enter_context(_frozen_parameters(run.guide_trace, modules))
            traces = [rerun_guide(r, r.aliases) for r in runs]
            # here, for a flow reads its parameters now; the model's densities outside, for it may share them
            densities = [{n: _log_prob(s, layout, particle_dim) for n, s in _samples(t).items()} for t in traces]
        return build(traces, False, densities)

    def redraw(as_drawn: bool) -> dict[str, torch.Tensor]:
        out: dict[str, list[torch.Tensor]] = {}
        for run in runs:
            trace = rerun_guide(run, {n: v.detach() for n, v in run.values.items()})
            for name, site in _samples(trace).items():
                density = _score(site, layout, particle_dim) if as_drawn else None
                if density is None:
                    density = _log_prob(site, layout, particle_dim)[0].sum(dim=-1)
                out.setdefault(name, []).append(density)
        return {n: torch.cat(v) for n, v in out.items()}

    repeated: dict[Any, Terms] = {}

    def rerun(choose: Callable[[Draw], Choice], given: Mapping[str, Any], repeat: int) -> Terms:
        if repeat == 1:
            return rerun_at(choose, given, repeat)
        # A step asks thrice: for the gradient, the bound and the shaped bound.
        asked = choose, repeat, tuple((n, v.tobytes()) for n, v in given.items())
        for differentiable in {True, torch.is_grad_enabled()}:
            if (asked, differentiable) in repeated:
                return repeated[asked, differentiable]
        return repeated.setdefault((asked, torch.is_grad_enabled()), rerun_at(choose, given, repeat))

    def rerun_at(choose: Callable[[Draw], Choice], given: Mapping[str, Any], repeat: int) -> Terms:
        device = next(iter(runs[0].values.values())).device
        given = _tree(lambda x: torch.as_tensor(x, device=device), given)
        dim = particle_dim if repeat == 1 or nesting is None else -1 - nesting
        if dim is None:
            out = [
                choose_values(run, programs, _Choose(choose, run.values, _tree(lambda x, at=at: x[at], given)))
                for at, run in enumerate(run for run in runs for _ in range(repeat))
            ]
        else:
            (run,), plate = runs, pyro.plate(_PARTICLES, num_particles * repeat, dim=dim)
            drawn = run.values if together else _as_particle(run, dim)
            drawn = {n: v.repeat_interleave(repeat, dim=0) for n, v in drawn.items()}
            pair = plate(programs[0]), plate(programs[1])
            out = [choose_values(replace(run, values=drawn), pair, _Choose(choose, drawn, given))]
        parts = [_site_arrays(r.guide_trace, r.model_trace, layout, dim, analytic_kl) for r, _ in out]
        return replace(_terms(parts, [r for r, _ in out], layout, step), **chosen(out, dim))

    def choose_values(run: _Run, pair: tuple[Callable, Callable], chooser: _Choose) -> tuple[_Run, dict[str, Choice]]:
        """Guide and model run again at chosen values; a relaxed one lies between the states, so none is validated."""
        for module in modules:
            _refuse_dropout(module)
        with poutine.block(), pyro.validation_enabled(False), kept_buffers(modules, buffers):
            with chooser, _Replay(run.subsamples):
                guide_trace = poutine.trace(pair[1]).get_trace(*args, **kwargs)
            values = {n: s["value"] for n, s in _samples(guide_trace).items() if not s["is_observed"]}
            given = {**run.subsamples, **values}
            with _Replay(given):
                model_trace = poutine.trace(pair[0]).get_trace(*args, **kwargs)
            model_trace = _marginalised(model_trace, pair[0], args, kwargs, given, guide_trace)
        return replace(run, guide_trace=guide_trace, model_trace=model_trace, values=values), chooser.choices

    def chosen(out: list[tuple[_Run, dict[str, Choice]]], dim: int | None) -> dict[str, Any]:
        """What the estimator scored and kept, particles first."""
        scores: dict[str, list[torch.Tensor]] = {}
        kept: dict[str, dict[str, list[torch.Tensor]]] = {}
        for run, choices in out:
            for name, choice in choices.items():
                if choice.score is not None:
                    fn = run.guide_trace.nodes[name]["fn"]
                    event_ndim = fn.event_dim + isinstance(_strip(fn)[0], dist.Categorical)
                    scores.setdefault(name, []).append(_lead(choice.score, event_ndim, layout, dim).sum(dim=-1))
                for key, value in choice.kept.items():
                    kept.setdefault(name, {}).setdefault(key, []).append(value[None] if dim is None else value)
        joined = {n: {key: torch.cat(v) for key, v in each.items()} for n, each in kept.items()}
        return {"scores": {n: torch.cat(v) for n, v in scores.items()}, "kept": joined}

    def dreamt() -> torch.Tensor:
        run, (alone_model, alone_guide) = runs[0], programs
        places = places_of_data({n: s["value"] for n, s in _samples(run.model_trace).items() if s["is_observed"]}, args)
        with poutine.block(), torch.no_grad(), kept_buffers(modules, buffers), _Replay(run.subsamples):
            asleep = poutine.trace(poutine.uncondition(alone_model)).get_trace(*args, **kwargs)
        new = list(args)
        for name, place in places.items():
            new[place] = torch.as_tensor(asleep.nodes[name].get("value")).to(args[place].dtype)
        latent = {n: s["value"] for n, s in _samples(asleep).items() if n not in places}
        with poutine.block(), kept_buffers(modules, buffers), _Replay({**run.subsamples, **latent}):
            guide_trace = poutine.trace(alone_guide).get_trace(*new, **kwargs)
        densities = [_log_prob(s, layout, None)[0].sum(dim=-1) for s in _samples(guide_trace).values()]
        return sum(densities[1:], start=densities[0])

    terms = build([r.guide_trace for r in runs], analytic_kl, [{} for _ in runs])
    each = [_recorded(r.guide_trace) for r in runs]
    recorded = each[0] if together else {n: torch.stack([r[n] for r in each]) for n in each[0]}
    data = args[0] if args else None
    terms = replace(terms, refreeze=refreeze, redraw=redraw, rerun=rerun, dreamt=dreamt)
    return replace(terms, recorded=recorded, data=data)


def _as_particle(run: _Run, particle_dim: int) -> dict[str, torch.Tensor]:
    """The latents of a run without a plate of particles, as those of the only particle in one."""
    leading = {n: v.dim() - run.guide_trace.nodes[n]["fn"].event_dim + particle_dim for n, v in run.values.items()}
    return {n: v.reshape((1,) * -leading[n] + v.shape) for n, v in run.values.items()}


def _tree(fn: Callable, tree: Any) -> Any:
    """``fn`` of every leaf of nested mappings."""
    return {k: _tree(fn, v) for k, v in tree.items()} if isinstance(tree, Mapping) else fn(tree)


def _hook(run: _Run, ratio: torch.Tensor, layout: _Layout, particle_dim: int | None) -> None:
    """Multiply every gradient that flows into the drawn values by ``ratio``."""
    dims = layout.dims if particle_dim is None else (particle_dim, *layout.dims)
    for name, alias in run.aliases.items():
        if not alias.requires_grad:
            continue
        event_ndim = run.guide_trace.nodes[name]["fn"].event_dim
        shape = [1] * alias.dim()
        for size, dim in zip(ratio.shape, dims, strict=True):
            shape[alias.dim() - event_ndim + dim] = size
        factor = ratio.reshape(shape)
        alias.register_hook(lambda grad, factor=factor: grad * factor)


def _site_arrays(
    guide_trace: Any,
    model_trace: Any,
    layout: _Layout,
    particle_dim: int | None,
    analytic_kl: bool,
    densities: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One run's arrays: observed log densities and per-site terms; ``densities`` are the guide's, where known."""
    known = densities or {}
    observed = {
        n: _log_prob(s, layout, particle_dim)[0].sum(dim=-1)
        for n, s in _samples(model_trace).items()
        if s["is_observed"]
    }
    sites = {
        name: _site(name, guide_trace, model_trace, layout, particle_dim, analytic_kl, known.get(name))
        for name in _samples(guide_trace)
    }
    return {"observed": observed, "sites": sites}


def _site(
    name: str,
    guide_trace: Any,
    model_trace: Any,
    layout: _Layout,
    particle_dim: int | None,
    analytic_kl: bool,
    density: tuple[torch.Tensor, bool] | None,
) -> dict[str, Any]:
    """The arrays of one :class:`Site`, by attribute."""
    site, prior = guide_trace.nodes[name], model_trace.nodes.get(name)
    kl: dict[str, Any] = {}
    if prior is not None and analytic_kl and _kl_valid(name, model_trace, guide_trace):
        kl = _analytic_kl(site, prior, layout, particle_dim)
        if kl and site["fn"].has_rsample:
            return kl
    guide_terms, guide_factors = density or _log_prob(site, layout, particle_dim)
    log_guide = guide_terms.sum(dim=-1)
    if prior is None:  # an auxiliary variable of the guide
        return {"log_guide": log_guide, "log_prior": torch.zeros_like(log_guide)}
    prior_terms, prior_factors = _log_prob(prior, layout, particle_dim)
    arrays = {"log_guide": log_guide, "log_prior": prior_terms.sum(dim=-1)}
    if not site["fn"].has_rsample and not _is_plain(site, layout):
        arrays["score"] = _score(site, layout, particle_dim)
    if guide_factors and prior_factors and guide_terms.shape == prior_terms.shape:
        arrays |= {"log_prior_terms": prior_terms, "log_guide_terms": guide_terms}
    return arrays | kl | _quantisation_errors(site["fn"], layout, particle_dim)


def _quantisation_errors(fn: Any, layout: _Layout, particle_dim: int | None) -> dict[str, torch.Tensor]:
    """The errors of a distribution that quantises, ``(K, *P)`` by attribute of :class:`Site`; empty for others."""
    base, factors = _strip(fn)
    errors = getattr(base, "quantisation_errors", ())
    return {n: _lead(e, factors, layout, particle_dim).sum(dim=-1) for n, e in errors}


def _support(site: Any) -> Any:
    """The support of a model's site; None where it states none, and where there is no such site."""
    with contextlib.suppress(NotImplementedError):
        return None if site is None else site["fn"].support
    return None


def _terms(parts: list[dict[str, Any]], runs: list[_Run], layout: _Layout, step: Any) -> Terms:
    """Join the particles' arrays."""

    def join(xs: list[torch.Tensor]) -> torch.Tensor:
        return xs[0] if len(xs) == 1 else torch.cat(xs)

    latent = _samples(runs[0].guide_trace)
    sites = {
        name: Site(
            **{k: join([p["sites"][name][k] for p in parts]) for k in parts[0]["sites"][name]},
            reparameterised=bool(latent[name]["is_observed"] or latent[name]["fn"].has_rsample),
            plain=_is_plain(latent[name], layout),
            auxiliary=name not in runs[0].model_trace.nodes,
            support=_support(runs[0].model_trace.nodes.get(name)),
            guide_family=type(_strip(latent[name]["fn"])[0]).__name__,
            event_shape=tuple(latent[name]["fn"].event_shape),
            num_classes=_num_classes(_strip(latent[name]["fn"])[0]),
        )
        for name in parts[0]["sites"]
    }
    observed = {name: join([p["observed"][name] for p in parts]) for name in parts[0]["observed"]}
    like = next(iter([*(s.rate for s in sites.values()), *observed.values()]), None)
    if like is None:
        raise must(
            "program", "have a sample site", "none", "Add pyro.sample statements to model and guide", InvalidArgument
        )
    log_lik = (
        sum(list(observed.values())[1:], start=next(iter(observed.values()))) if observed else torch.zeros_like(like)
    )
    vectorised = len(runs) == 1 and log_lik.shape[0] > 1
    values = runs[0].values if vectorised else {n: torch.stack([r.values[n] for r in runs]) for n in runs[0].values}
    return Terms(
        log_lik,
        sites,
        step=step,
        scale=layout.scale,
        joint=layout.joint,
        estimated=layout.estimated,
        data_per_entry=layout.data_per_entry,
        observed=observed,
        values=values,
    )


def runs_several(objective: Objective) -> bool:
    """Whether a step runs the program at several values of its latents."""
    return objective.num_particles > 1 or objective.gradient.repeats


def particle_plate(model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any]) -> int | None:
    """Where a plate of particles fits, left of the program's own: its nesting; None if the program must be looped.

    A program that was not written for it may refuse extra dims on the left or, worse, mix particles with data in
    silence. So two particles are run in a plate and then one by one at the same values, with no effect outside; unless
    the densities agree, a warning says that particles will be run one by one. A program with noise of its own (dropout)
    does not agree with itself, which tells nothing: it is taken to broadcast.
    """
    with poutine.block(), torch.no_grad(), _no_effect(owners(model, guide)):
        alone = _run(model, guide, args, kwargs, {})
        nesting = _nesting(alone)
        try:
            with pyro.validation_enabled(False):  # data outside a support are for the first step to name
                wrong = _mixes_particles(model, guide, args, kwargs, alone, nesting)
        except InvalidArgument:  # what the program must be anyway
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            wrong = f"{type(error).__name__}: {error}"
    if not wrong:
        return nesting
    warnings.warn(
        f"The program does not broadcast over a particle dim on the left ({wrong}), so its particles, or "
        "the states that are summed over, are run one by one, which is slower. Count dims from the right, and put data "
        "in a plate.",
        stacklevel=3,
    )
    return None


@contextmanager
def _no_effect(modules: list[torch.nn.Module]) -> Iterator[None]:
    """The random state and the modules' buffers are after what they were before."""
    with torch.random.fork_rng(devices=_gpus()), kept_buffers(modules):
        yield


Buffers = list[tuple[torch.Tensor, torch.Tensor]]
"""Modules' buffers, each with a copy of what it held."""


def _buffers(modules: list[torch.nn.Module]) -> Buffers:
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]


@contextmanager
def kept_buffers(modules: list[torch.nn.Module], start: Buffers | None = None) -> Iterator[None]:
    """Buffers move once a step, however often a program is run.

    Args:
        start: what they hold inside at first, as at the step's first run, so that a rerun is one.
    """
    after = _buffers(modules)
    for buffer, value in start or ():
        buffer.data.copy_(value)
    yield
    for buffer, value in after:
        buffer.data.copy_(value)


def _nesting(run: _Run) -> int:
    """The program's plate depth (or batch dims, where it has more of those)."""
    sites = [*_samples(run.model_trace).values(), *_samples(run.guide_trace).values()]
    plates = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
    return max([*plates, *(len(s["fn"].batch_shape) for s in sites)], default=0)


def _mixes_particles(
    model: Callable, guide: Callable, args: tuple, kwargs: Mapping[str, Any], alone: _Run, nesting: int
) -> str:
    """Why two particles in a plate are not what they are one by one; empty where they are."""
    plate = pyro.plate(_PARTICLES, 2, dim=-1 - nesting)
    both = _run(plate(model), plate(guide), args, kwargs, alone.subsamples)
    layout = _layout(both.model_trace, both.guide_trace)
    together = _densities(both, layout, -1 - nesting)

    def particle(k: int) -> torch.Tensor:
        values = {n: v[k].reshape(alone.values[n].shape) for n, v in both.values.items()}
        with _Replay({**alone.subsamples, **values}):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(model).get_trace(*args, **kwargs)
        model_trace = _marginalised(model_trace, model, args, kwargs, {**alone.subsamples, **values}, guide_trace)
        run = replace(alone, guide_trace=guide_trace, model_trace=model_trace)
        return _densities(run, layout, None)[:, 0]

    for k in range(2):
        one = particle(k)
        if not _close(together[:, k], one) and _close(one, particle(k)):
            return "the densities of particles in a plate differ from those of the same particles one by one"
    return ""


def _densities(run: _Run, layout: _Layout, particle_dim: int | None) -> torch.Tensor:
    """Every log density of the program, ``(sites, K, *P)``."""
    arrays = _site_arrays(run.guide_trace, run.model_trace, layout, particle_dim, False)
    sites = [site[name] for site in arrays["sites"].values() for name in ("log_guide", "log_prior")]
    return torch.stack(torch.broadcast_tensors(*sites, *arrays["observed"].values()))


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)


# --- drop-in loss -----------------------------------------------------------------------------------------------


OWN = "elbozoo."
"""What the names of parameters begin with that are a gradient estimator's, not the program's."""


class OwnNumbers:
    """What a gradient estimator trains (in the parameter store) and remembers, from the first data it sees."""

    def __init__(self, objective: Objective):
        self.gradient, self.memory = objective.gradient, {}
        self._start: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None

    def put_into(self, terms: Terms) -> Terms:
        """The terms with these numbers."""
        if self._start is None:
            self._start = self.gradient.initial(terms.data, terms.sites)
            self.memory = {n: torch.as_tensor(v).to(terms.log_lik) for n, v in self._start[1].items()}
        trained = {
            n: pyro.param(OWN + n, lambda v=v: torch.as_tensor(v).to(terms.log_lik)) for n, v in self._start[0].items()
        }
        return replace(terms, trained=trained, memory=self.memory)


class _WithGradientOf(torch.autograd.Function):
    """A value, differentiated as a surrogate, whose own value may be infinite (a particle of zero weight)."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradients[0]


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """Inside, this thread takes numbers nearer to 0 than the smallest normal one for 0, as XLA does throughout.

    A processor is many times slower with them, and training makes them: Adam's mean of a gradient that has
    become 0, and under ``Enumerate`` whatever is weighted by the probability of a class that is out of the question.
    torch's own threads go by what held when they were started: those that are started inside keep it.
    """
    smallest = torch.tensor(torch.finfo(torch.float32).tiny, dtype=torch.float32, device="cpu")
    before = bool(smallest / 2 == 0)  # there is no other way to ask
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class Loss(PyroELBO):
    r"""An elbozoo objective as a ``pyro.infer.ELBO``, for Pyro's own ``SVI``.

    .. code-block:: python

        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss=Loss(IWAE(50)))

    Its value is minus the *unshaped* bound summed over the shared plates (times their subsample scale); its gradient
    is that of the objective's surrogate. It counts its own steps (``loss.step``) for schedules.

    Plates that every site shares give per-datum weights. A site outside them (a global latent) makes one joint weight
    for the whole batch; a warning says so.

    Args:
        objective: bound, gradient and shape.
        vectorize_particles: put particles into a plate of their own where the program broadcasts over it (tried at the
            first step; a warning says where it does not); False runs them one by one.
        max_plate_nesting: the program's plate depth, for a program that is known to broadcast: nothing is then tried.

    Raises: Refused at the first step for a pair of objective and site that has no right gradient.
    """

    def __init__(self, objective: Objective, vectorize_particles: bool = True, max_plate_nesting: int | None = None):
        super().__init__(num_particles=objective.num_particles, vectorize_particles=False)
        self.objective = objective
        self.vectorize_particles = vectorize_particles
        self.plate_nesting = max_plate_nesting
        self.step = 0
        self.own = OwnNumbers(objective)

    def terms(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Terms:
        """Run the program once and check the objective against it."""
        if runs_several(self.objective) and self.vectorize_particles and self.plate_nesting is None:
            self.plate_nesting = particle_plate(model, guide, args, kwargs)
            self.vectorize_particles = self.plate_nesting is not None
        terms = particles(
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            analytic_kl=self.objective.uses_analytic_kl,
            step=self.step,
            nesting=self.plate_nesting if self.vectorize_particles else None,
        )
        terms = self.own.put_into(terms)
        self.objective.check(terms)
        return terms

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("elbozoo's Loss hands out Terms, not traces; see Loss.terms")

    @torch.no_grad()
    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Minus the bound (not differentiated, the step counter does not move)."""
        terms = self.terms(model, guide, *args, **kwargs)
        return (-terms.scale * self.objective.bound(terms).sum()).item()

    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A tensor with the value of :meth:`loss` and the surrogate's gradient; counts one step."""
        return _WithGradientOf.apply(*self._value_and_surrogate(model, guide, args, kwargs))

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Backpropagate the surrogate; return minus the bound. ``SVI.step`` calls it."""
        with flushed_denormals():
            value, surrogate = self._value_and_surrogate(model, guide, args, kwargs)
            if surrogate.requires_grad:
                surrogate.backward()
        return value.item()

    def _value_and_surrogate(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Any, Any]:
        terms = self.terms(model, guide, *args, **kwargs)
        value = -terms.scale * self.objective.bound(terms).detach().sum()
        surrogate = -terms.scale * self.objective.surrogate(terms).sum()
        self.step += 1
        self.own.memory = {n: v.detach() for n, v in self.objective.remember(terms).items()}
        return value, surrogate


# --- a guide of its own for every datum -------------------------------------------------------------------------


class _Localise(poutine.messenger.Messenger):
    """Add offsets to the unconstrained parameters of latent sites' distributions."""

    def __init__(self, offsets: Mapping[str, Mapping[str, torch.Tensor]], full_covariance: bool):
        super().__init__()
        self.offsets, self.full_covariance = offsets, full_covariance

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.offsets:
            cls, count, parameters = _local_parameters(msg["name"], msg["fn"], self.full_covariance)
            offsets = self.offsets[msg["name"]]
            moved = {n: transform(value + offsets[n]) for n, (value, transform) in parameters.items()}
            msg["fn"] = cls(**moved).to_event(count)


def _local_parameters(name: str, fn: Any, full_covariance: bool) -> tuple[type, int, dict[str, Any]]:
    """The class of a site's distribution, how many batch dims are events, each parameter unconstrained with its map."""
    base, count = _strip(fn)
    shape = tuple(base.batch_shape)
    if full_covariance and type(base) is dist.Normal and count == 1:
        base, count, shape = dist.MultivariateNormal(base.loc, scale_tril=base.scale.diag_embed()), 0, shape[:-1]
    parameters = {}
    for parameter in own_parameters(name, base):
        constraint, value = base.arg_constraints[parameter], getattr(base, parameter)
        value = value.expand(shape + tuple(value.shape[value.dim() - constraint.event_dim :]))
        transform = transform_to(constraint)
        parameters[parameter] = transform.inv(value), transform
    check_made_of(name, type(base), {n: getattr(base, n) for n in parameters})
    return type(base), count, parameters


# --- programs ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Program:
    r"""A Pyro model and its amortised guide.

    ``program.model`` and ``program.guide`` are the callables themselves, for Pyro's own ``SVI``, ``Predictive``,
    handlers and MCMC. PyroModules carry their parameters; a program that uses ``pyro.param`` keeps them here
    (``store``), so that nothing is left in the global parameter store.

    Args:
        model, guide: callables with the same arguments.
        spec: the zoo spec they were made from, if any.
        store: a parameter-store state (``pyro.get_param_store().get_state()``) to run with.
        trained: whether the weights mean something (``fit`` starts from them) or are a zoo program's initial ones.
        local_to: how many data the guide has parameters for, each for one of them (see :meth:`localised`); None for an
            amortised guide.
    """

    model: Callable
    guide: Callable
    spec: Any = None
    store: dict[str, Any] = field(default_factory=lambda: {"params": {}, "constraints": {}})
    trained: bool = False
    local_to: int | None = None

    engine = "pyro"

    def fresh(self) -> Program:
        """What ``fit`` starts from: a copy, or new initial weights for a zoo program without trained ones."""
        if self.spec is None or self.trained:
            return self.copy()
        return self.spec.pyro(name=self.model._pyro_name)

    @contextmanager
    def parameters(self) -> Iterator[None]:
        """Run inside with this program's own parameter store; the global one is untouched.

        Pyro's own ``scope`` would strip the global parameters of what its SVI reads, so it cannot serve inside a user's
        program; the store's three tables are exchanged instead.
        """
        store = pyro.get_param_store()
        outer = store._params, store._param_to_name, store._constraints
        store._params, store._constraints = self.store["params"], self.store["constraints"]
        store._param_to_name = {p: n for n, p in store._params.items()}
        try:
            yield
        finally:
            store._params, store._param_to_name, store._constraints = outer

    def copy(self) -> Program:
        """A deep copy: modules and stored parameters (a module that a plain function closes over is shared)."""
        parts = [part for module in self._modules() for part in module.modules()]
        models = {i: part._model for i, part in enumerate(parts) if isinstance(part, AutoGuide)}
        model, guide, store = copy.deepcopy((self.model, self.guide, self.store))
        twin = Program(model, guide, self.spec, store, self.trained, self.local_to)
        copies = [part for module in twin._modules() for part in module.modules()]
        for i, owned in models.items():  # an autoguide forgets its model when it is copied, and so does its copy
            parts[i].__dict__["_model"] = copies[i].__dict__["_model"] = owned
        return twin

    @property
    def shares_modules(self) -> bool:
        """Whether a plain function closes over a module, which no copy has for itself (known once it has run)."""
        own = {id(v) for module in self._modules() for v in module.parameters()}
        return any(isinstance(v, torch.nn.Parameter) and id(v) not in own for v in self.store["params"].values())

    def frozen(self) -> Program:
        """The same program with constant parameters: no ``param`` site shows outside, no gradient reaches them."""
        twin = self.copy()
        for module in twin._modules():
            module.eval()
        for p in twin._tensors().values():
            p.requires_grad_(False)
        model, guide = _Hidden(twin.model, twin), _Hidden(twin.guide, twin)
        return Program(model, guide, self.spec, twin.store, True, self.local_to)

    def _modules(self) -> list[torch.nn.Module]:
        return owners(self.model, self.guide)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Every parameter and buffer, unconstrained, by state-dict name, then those of the store alone."""
        out: dict[str, torch.Tensor] = {}
        for module in self._modules():
            for name, value in module.state_dict(keep_vars=True).items():
                if name in out and out[name] is not value:
                    raise must(
                        "program",
                        "use one name for one parameter",
                        f"'{name}' in model and guide",
                        "Rename one of the submodules",
                    )
                out[name] = value
        known = {id(v) for v in out.values()}
        out |= {
            n: v for n, v in self.store["params"].items() if id(v) not in known and n.replace("$$$", ".") not in out
        }
        return out

    @property
    def weights(self) -> dict[str, np.ndarray] | None:
        """Parameters and buffers as NumPy arrays by ``state_dict`` name; ``None`` where there are none yet."""
        tensors = self._tensors()
        return {n: v.detach().cpu().numpy().copy() for n, v in tensors.items()} or None

    def with_weights(self, weights: Mapping[str, np.ndarray], *example: Any) -> Program:
        """A copy of this program with the weights of a file written by either engine.

        Args:
            weights: NumPy arrays in torch's names and layouts.
            example: arguments to run the program on once, so that ``pyro.param`` statements exist; not needed for
                modules.
        Raises: InvalidArgument naming missing or unexpected weights and wrong shapes.
        """
        twin = self.copy()
        if example:
            twin.materialise(example)
        tensors = twin._tensors()
        check_names(weights, list(tensors))
        with torch.no_grad():
            for name, tensor in tensors.items():
                if tuple(weights[name].shape) != tuple(tensor.shape):
                    raise must(
                        f"weights['{name}']",
                        f"have shape {tuple(tensor.shape)}",
                        weights[name].shape,
                        "Load weights of a program with the same hyperparameters",
                    )
                tensor.copy_(torch.as_tensor(weights[name]))
        twin.trained = True
        return twin

    def materialise(self, args: tuple) -> None:
        """Run once, so that every ``pyro.param`` has its initial value."""
        with self.parameters(), torch.no_grad():
            _run(self.model, self.guide, self._inputs(args), {}, {})

    @property
    def float_dtype(self) -> np.dtype:
        """The type of floats that the program computes in: its parameters', else torch's default."""
        tensors = (v for v in self._tensors().values() if v.is_floating_point())
        return torch.empty(0, dtype=next((v.dtype for v in tensors), None)).numpy().dtype

    @property
    def device(self) -> torch.device | None:
        """Where its parameters are, those that a frozen program hides among them; None without any."""
        if isinstance(self.model, _Hidden):
            return self.model._program.device
        return next((v.device for v in self._tensors().values()), None)

    def _inputs(self, args: tuple) -> tuple:
        """NumPy arrays as tensors, floats in the parameters' type; all tensors on the parameters' device."""
        device, dtype = self.device, self.float_dtype
        arrays = (a.astype(dtype, copy=False) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args)
        return tuple(
            torch.as_tensor(a, device=device) if isinstance(a, np.ndarray | torch.Tensor) else a for a in arrays
        )

    def apply(
        self,
        fn: Callable[[Terms], Any],
        args: tuple,
        *,
        num_particles: int = 1,
        seed: int = 0,
        analytic_kl: bool = False,
        values: Mapping[str, np.ndarray] | None = None,
    ) -> Any:
        """``fn(terms)`` on the data ``args``, without gradients; a tree (dicts) of NumPy arrays.

        Args:
            fn: a function of :class:`Terms`.
            args: the data.
            num_particles: K fresh particles, where no values are given.
            seed: of the particles.
            analytic_kl: use closed forms of the KL where they are valid.
            values: latents ``(K, …)`` by site to take the densities at, in place of fresh draws.
        """
        with torch.no_grad(), self._running(seed):
            args = self._inputs(args)
            given = None
            if values is not None:
                given = dict(zip(values, self._inputs(tuple(values.values())), strict=True))
                num_particles = len(next(iter(given.values())))
            terms = self.terms(args, num_particles=num_particles, analytic_kl=analytic_kl, values=given)
            return _to_numpy(fn(terms))

    def log_density(self, values: Mapping[str, np.ndarray], args: tuple) -> np.ndarray:
        """``log p(x, z)`` of the whole data ``args`` at latents ``(K, …)``, scales included, ``(K,)``, nats.

        Of the model alone: the guide is not run.
        """
        with torch.no_grad(), self._running(0):
            given, inputs = dict(zip(values, self._inputs(tuple(values.values())), strict=True)), self._inputs(args)
            out = []
            for k in range(len(next(iter(given.values())))):
                with _Replay({name: value[k] for name, value in given.items()}):
                    trace = poutine.trace(self.model).get_trace(*inputs)
                refuse_summed_out(n for n, s in _samples(trace).items() if _is_summed_out(s) and n not in given)
                out.append(float(trace.log_prob_sum()))
        return np.array(out)

    def localised(self, args: tuple, full_covariance: bool = False) -> Program:
        """This program with constant parameters and a guide that is optimised for each datum of ``args`` by itself.

        Each parameter of each latent's distribution gets an offset a datum, unconstrained, to be trained: the
        amortised guide is where they are all 0. A site that depends on others keeps its network of them.

        Args:
            args: the data; the result is for these alone, in this order.
            full_covariance: let diagonal Gaussians become full ones.
        Raises: InvalidArgument for a site whose distribution has no parameters of its own (a flow).
        """
        frozen, zeros = self.frozen(), {}
        with torch.no_grad(), frozen._running(0):
            for name, site in _samples(poutine.trace(frozen.guide).get_trace(*self._inputs(args))).items():
                if not site["is_observed"]:
                    parameters = _local_parameters(name, site["fn"], full_covariance)[2]
                    zeros[name] = {n: torch.zeros_like(value) for n, (value, _) in parameters.items()}

        def guide(*args: Any) -> Any:
            offsets = {
                name: {n: pyro.param(f"{name}.local_{n}", zero.clone()) for n, zero in each.items()}
                for name, each in zeros.items()
            }
            with _Localise(offsets, full_covariance):
                return frozen.guide(*args)

        return Program(frozen.model, guide, local_to=len(args[0]))

    def outline(self, args: tuple, objective: Objective | None = None) -> Terms:
        """The :class:`Terms`, for their shapes, supports and flags, of one particle or of an objective's.

        Raises: what ``objective.check`` does.
        """
        with torch.no_grad(), self._running(0):
            terms = self.terms(self._inputs(args), num_particles=1 if objective is None else objective.num_particles)
            if objective is not None:
                objective.check(terms)
            return terms

    def guide_parameters(self, args: tuple) -> frozenset[str]:
        """Names of the parameters that the guide alone uses."""
        twin = self.copy()
        with torch.no_grad(), twin._running(0):
            guide_trace = poutine.trace(twin.guide).get_trace(*twin._inputs(args))
            model_trace = poutine.trace(poutine.replay(twin.model, guide_trace)).get_trace(*twin._inputs(args))
        names = {id(v): n for n, v in twin._tensors().items()}
        guide, model = (
            {names[id(twin.store["params"][n])] for n, s in tr.nodes.items() if s.get("type") == "param"}
            for tr in (guide_trace, model_trace)
        )
        return frozenset(guide - model)

    @contextmanager
    def _running(self, seed: int) -> Iterator[None]:
        """Inside, this program's parameters and a random state of its own."""
        with self.parameters(), torch.random.fork_rng(devices=_gpus()), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield

    def terms(self, args: tuple, **options: Any) -> Terms:
        """The program's :class:`Terms` on tensors; for use inside :meth:`_running`."""
        if options["num_particles"] > 1 and "_nesting" not in self.__dict__:
            self.__dict__["_nesting"] = particle_plate(self.model, self.guide, args, {})
        return particles(self.model, self.guide, args, nesting=self.__dict__.get("_nesting"), **options)

    def predict(
        self,
        args: tuple,
        *,
        num_particles: int = 1,
        seed: int = 0,
        prior: bool = False,
        values: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, dict[str, np.ndarray]]:
        """Draws of the latents and of every observed site given them.

        Args:
            args: the data (its shapes alone matter when ``prior``).
            prior: draw latents from the model instead of the guide.
            values: latents to go on from instead, ``(K, …)`` by site.
        Returns: ``{"latent": {site: (K, …)}, "observed": {site: (K, …)}, "mean": {site: (K, …)}}``; "mean" holds the
            sites whose distribution has one.
        """
        draws: list[dict[str, dict[str, Any]]] = []
        with torch.no_grad(), self._running(seed):
            args = self._inputs(args)
            for k in range(num_particles):
                known = self._latents(args, k, prior, values)
                with _Replay(known):
                    trace = poutine.trace(self.model).get_trace(*args)
                sites = _samples(trace).items()
                refuse_summed_out(n for n, s in sites if not prior and _is_summed_out(s) and n not in known)
                out: dict[str, dict[str, Any]] = {"latent": {}, "observed": {}, "mean": {}}
                for name, site in _samples(trace).items():
                    if not site["is_observed"]:
                        out["latent"][name] = site["value"]
                    elif tuple(site["fn"].shape()):
                        out["observed"][name] = site["fn"].sample()
                        with contextlib.suppress(NotImplementedError):  # not every distribution has a mean
                            out["mean"][name] = site["fn"].mean
                draws.append(_to_numpy(out))
        return {g: {n: np.stack([d[g][n] for d in draws]) for n in draws[0][g]} for g in draws[0]}

    def _latents(self, args: tuple, k: int, prior: bool, values: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
        """What the model's latents are given as: nothing from the prior, ``values`` at particle k, else the guide's."""
        if values is not None:
            return dict(zip(values, self._inputs(tuple(v[k] for v in values.values())), strict=True))
        return {} if prior else _run(self.model, self.guide, args, {}, {}).values


class _Hidden:
    """A callable whose parameters an outer program does not see; its methods too (``program.model.decode(z)``)."""

    def __init__(self, fn: Callable, program: Program):
        self._fn, self._program = fn, program

    def _hide(self, fn: Callable) -> Callable:
        def hidden(*args: Any, **kwargs: Any) -> Any:
            with self._program.parameters(), poutine.block(hide_types=["param"]):
                return fn(*args, **kwargs)

        return hidden

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._hide(self._fn)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_fn" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        attribute = getattr(self._fn, name)
        return self._hide(attribute) if callable(attribute) else attribute


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _to_numpy(v) for k, v in tree.items()}
    return tree.detach().cpu().numpy() if isinstance(tree, torch.Tensor) else np.asarray(tree)
