"""The NumPyro engine: the one file that reads NumPyro traces.

:class:`Loss` is a ``numpyro.infer.ELBO``; hand it to ``numpyro.infer.SVI`` with any model and guide.
:class:`Program` wraps a model and a guide for the harness.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from jax.lax import stop_gradient
from numpyro.distributions import (
    Bernoulli,
    ExpandedDistribution,
    Independent,
    MaskedDistribution,
    MultivariateNormal,
    Normal,
    biject_to,
)
from numpyro.distributions.distribution import validation_enabled
from numpyro.distributions.kl import kl_divergence
from numpyro.handlers import block, replay, seed, substitute, trace, uncondition
from numpyro.handlers import seed as seed_handler
from numpyro.infer import ELBO as NumPyroELBO
from numpyro.infer.util import log_density
from numpyro.primitives import Messenger
from numpyro.primitives import mutable as mutable_site
from numpyro.util import check_model_guide_match

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
from elbozoo.inference.numpyro_distributions import OneHotCategorical
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
from elbozoo.inference.weights import BUFFERS, from_torch_layout, to_torch_layout

STEP = "elbozoo_step"
_ESTIMATOR = "elbozoo_estimator"  # what a gradient estimator trains of its own
MEMORY = "elbozoo_memory"  # and what it remembers
OWN_SITES = (STEP, _ESTIMATOR, MEMORY)
"""Sites of a guide that are ours, not the program's."""

products_in_full = partial(jax.default_matmul_precision, "float32")
"""Inside, products of float32 matrices keep all digits, of which a GPU's own choice drops more than half."""

Params = dict[str, Any]


# --- reading traces ---------------------------------------------------------------------------------------------


class _Assign(Messenger):
    """Give latent sites these values *after* they were drawn, so that seeds are consumed as in the first run."""

    def __init__(self, values: Mapping[str, jax.Array]):
        self.values = values
        super().__init__(None)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
            msg["intermediates"] = None


class _ChecksShapes(Messenger):
    """Refuses a latent value of the guide whose event shape is not the model's, before the model computes with it."""

    def __init__(self, guide_trace: Any):
        self.guide_trace = guide_trace
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.guide_trace:
            check_drawn_for(msg["name"], jnp.shape(self.guide_trace[msg["name"]]["value"]), msg["fn"].event_shape)


class _Choose(Messenger):
    """Give every latent site of the guide the value that an estimator chooses for it.

    Args:
        choose: the estimator's function.
        drawn: the values of the first run, by site.
        given: numbers for the estimator, by site.
        key: of fresh uniform numbers, none of which the program's own seeds depend on.
    """

    def __init__(self, choose: Callable[[Draw], Choice], drawn: Params, given: Mapping[str, Any], key: jax.Array):
        self.choose, self.drawn, self.given, self.key = choose, drawn, given, key
        self.choices: dict[str, Choice] = {}
        super().__init__(None)

    def _uniform(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        self.key, key = random.split(self.key)
        return random.uniform(key, shape, dtype, jnp.finfo(dtype).tiny)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "sample" or msg["is_observed"]:
            return
        base, name, fn = _strip(msg["fn"])[0], msg["name"], msg["fn"]
        logits = _logits(base)
        like = msg["value"] if logits is None else logits
        dtype = jnp.result_type(like, float)
        draw = Draw(
            name,
            _family(base),
            logits,
            msg["value"] if fn.has_rsample else stop_gradient(msg["value"]),
            self.drawn.get(name),
            self.given.get(name),
            lambda: self._uniform(jnp.shape(like), dtype),
            fn.event_dim,
        )
        self.choices[name] = choice = self.choose(draw)
        msg["value"], msg["intermediates"] = choice.value, None
        if choice.logits is not None:
            msg["fn"] = _with_logits(fn, choice.logits)


def _logits(fn: Any) -> Any:
    """The normalised logits of a Bernoulli or a categorical distribution; None for any other."""
    while isinstance(fn, ExpandedDistribution):
        shape, fn = fn.batch_shape, fn.base_dist
        inner = _logits(fn)
        return None if inner is None else jnp.broadcast_to(inner, shape + inner.shape[len(fn.batch_shape) :])
    family = _family(fn)
    if family == "Bernoulli":
        return jnp.asarray(fn.logits)
    return jax.nn.log_softmax(fn.logits) if family in ("Categorical", "OneHotCategorical") else None


def _with_logits(fn: Any, logits: jax.Array) -> Any:
    """A Bernoulli or a OneHotCategorical with other logits."""
    base, count = _strip(fn)
    return (Bernoulli if _family(base) == "Bernoulli" else OneHotCategorical)(logits=logits).to_event(count)


def _num_classes(fn: Any) -> int:
    """States of one entry."""
    logits = _logits(fn)
    return 0 if logits is None else 2 if _family(fn) == "Bernoulli" else logits.shape[-1]


def _family(fn: Any) -> str:
    """The distribution's name in both engines: NumPyro's tells what it is parametrised by."""
    while isinstance(fn, ExpandedDistribution):
        fn = fn.base_dist
    return type(fn).__name__.removesuffix("Logits").removesuffix("Probs")


class _StopUnreparameterised(Messenger):
    """Stop gradients at values whose sampler is not reparameterised."""

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and not msg["fn"].has_rsample:
            msg["value"], msg["intermediates"] = stop_gradient(msg["value"]), None


@dataclass(frozen=True)
class _Layout:
    """Static facts about a program, the same for every particle."""

    dims: tuple[int, ...]  # dims of the plates that every site shares
    scale: float  # their size / subsample size
    joint: bool  # some site lies outside a plate that another site is in
    estimated: str  # why the weight is not one; empty where it is
    data_per_entry: float
    sites: dict[str, dict[str, Any]]  # a site's facts, by attribute of Site
    control_flow: bool = False


class _SeesControlFlow(Messenger):
    """Notes whether a guide has a ``scan`` or a ``cond``."""

    seen = False

    def process_message(self, msg: Any) -> None:
        self.seen |= msg["type"] == "control_flow"


def _refuse_control_flow(layout: _Layout) -> None:
    """Inside a ``scan`` a guide that is run again draws anew, and its densities are not those of the drawn values."""
    if layout.control_flow:
        raise must(
            "guide",
            "draw its sites outside of scan and cond, for a gradient that runs it again",
            "one with control flow",
            "Use gradient=Pathwise(), or write the loop out",
            Refused,
        )


def _samples(tr: Mapping[str, Any]) -> dict[str, Any]:
    return {n: s for n, s in tr.items() if s["type"] == "sample"}


def _recorded(tr: Mapping[str, Any]) -> dict[str, Any]:
    """What a program records with ``numpyro.deterministic``."""
    return {n: s["value"] for n, s in tr.items() if s["type"] == "deterministic"}


def _layout(model_trace: Any, guide_trace: Any) -> _Layout:
    everything = [s for tr in (model_trace, guide_trace) for s in _samples(tr).values()]
    shared = (
        frozenset.intersection(*(frozenset(s["cond_indep_stack"]) for s in everything)) if everything else frozenset()
    )
    scale = 1.0
    for frame in shared:
        scale *= _full_size(frame, model_trace) / frame.size
    unshared = not shared and any(s["cond_indep_stack"] or s["fn"].batch_shape for s in everything)
    latent, observed = (
        frozenset().union(*(s["cond_indep_stack"] for s in everything if s["is_observed"] is seen))
        for seen in (False, True)
    )
    joint = unshared or bool(latent & observed - shared)
    data_per_entry = 1.0 if shared else _data_size(model_trace)
    sites = {
        n: {
            "plain": _is_plain(s, scale),
            "auxiliary": n not in model_trace,
            "support": _fixed_support(model_trace[n]["fn"]) if n in model_trace else None,
            **_facts(s),
        }
        for n, s in _samples(guide_trace).items()
    }
    estimated = _why_estimated(model_trace, guide_trace, shared)
    return _Layout(tuple(sorted(f.dim for f in shared)), scale, joint, estimated, data_per_entry, sites)


def _is_masked_out(fn: Any) -> bool:
    """Whether its densities count nowhere."""
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, MaskedDistribution) and (fn._mask is False or _is_masked_out(fn.base_dist))


def _why_estimated(model_trace: Any, guide_trace: Any, shared: frozenset[Any]) -> str:
    """What of the log weight is an estimate; empty for a weight."""
    for name, site in _samples(guide_trace).items():
        if _is_masked_out(site["fn"]):
            return f"site '{name}', which is masked out"
    for site in (*_samples(model_trace).values(), *_samples(guide_trace).values()):
        for frame in site["cond_indep_stack"]:
            if frame not in shared and shared and _full_size(frame, model_trace) != frame.size:
                return f"plate '{frame.name}', which is subsampled beside the data's"
    return ""


def _facts(site: Any) -> dict[str, Any]:
    """What is the same for every draw of a site, by attribute of :class:`Site`."""
    base = _strip(site["fn"])[0]
    return {
        "reparameterised": bool(site["is_observed"] or site["fn"].has_rsample),
        "guide_family": _family(base),
        "event_shape": tuple(site["fn"].event_shape),
        "num_classes": _num_classes(base),
    }


def _fixed_support(fn: Any) -> Any:
    """A distribution's support; None where its bounds are arrays (of data, of parameters), which outlive no trace."""
    bounds = jax.tree.leaves(fn.support)
    return fn.support if all(isinstance(b, int | float) for b in bounds) else None


def _full_size(frame: Any, model_trace: Any) -> int:
    """A plate's size before subsampling."""
    return model_trace[frame.name]["args"][0] if frame.name in model_trace else frame.size


def _data_size(model_trace: Any) -> float:
    """Full size of the largest stack of plates around an observed site (of its batch where there is no plate)."""
    sizes = [1.0]
    for site in _samples(model_trace).values():
        if site["is_observed"]:
            full = [_full_size(f, model_trace) for f in site["cond_indep_stack"]]
            sizes.append(float(np.prod(full or site["fn"].batch_shape or (1,))))
    return max(sizes)


def _strip(fn: Any) -> tuple[Any, int]:
    """The distribution inside ``Independent`` and the number of event dims it reinterpreted."""
    count = 0
    while isinstance(fn, Independent):
        fn, count = fn.base_dist, count + fn.reinterpreted_batch_ndims
    return fn, count


def _unmasked(fn: Any) -> Any:
    """The distribution without its masks; itself where it has none."""
    if isinstance(fn, MaskedDistribution):
        return _unmasked(fn.base_dist)
    if isinstance(fn, Independent | ExpandedDistribution):
        base = _unmasked(fn.base_dist)
        if base is not fn.base_dist:
            count = fn.reinterpreted_batch_ndims if isinstance(fn, Independent) else 0
            return base.to_event(count) if count else base.expand(fn.batch_shape)
    return fn


def _is_plain(site: Any, scale: float) -> bool:
    """No scale but the shared plates', and no mask."""
    own = 1.0 if site["scale"] is None else site["scale"]
    return isinstance(own, float | int) and own == scale and _unmasked(site["fn"]) is site["fn"]


def _score(site: Any, layout: _Layout) -> jax.Array:
    """The log density of the value as it was drawn, ``(*P)``: no scale, no mask."""
    if _is_plain(site, layout.scale):
        return _log_prob(site, layout)[0].sum(axis=-1)
    log_prob = _unmasked(site["fn"]).log_prob(site["value"])
    return plates_first(log_prob, log_prob.ndim, layout.dims).sum(axis=-1)


def _log_prob(site: Any, layout: _Layout) -> tuple[jax.Array, bool]:
    """Per-dimension log density ``(*P, D)``, less the shared plates' scale; whether it factorises."""
    fn, factors = _strip(site["fn"])
    value, intermediates = site["value"], site["intermediates"]
    if fn.event_dim and intermediates:  # of a flow, which may have no inverse
        fn, factors = site["fn"], 0
    log_prob = fn.log_prob(value, intermediates) if intermediates and factors == 0 else fn.log_prob(value)
    terms = plates_first(_rescale(log_prob, site, layout, factors), log_prob.ndim - factors, layout.dims)
    return terms, factors > 0 or site["fn"].event_dim == 0


def _rescale(x: jax.Array, site: Any, layout: _Layout, event_ndim: int) -> jax.Array:
    """``x``, whose last ``event_ndim`` dims are the site's event dims, times its scale over the shared plates'."""
    scale = 1.0 if site["scale"] is None else site["scale"]
    if isinstance(scale, float | int):
        return x if scale == layout.scale else x * (scale / layout.scale)
    return x * (jnp.reshape(scale, jnp.shape(scale) + (1,) * event_ndim) / layout.scale)


def _analytic_kl(guide_site: Any, model_site: Any, layout: _Layout) -> dict[str, jax.Array]:
    """``KL(q || p)`` ``(*P)``, and its terms ``(*P, D)`` where both factorise alike; empty: no closed form."""
    (q, q_factors), (p, p_factors) = _strip(guide_site["fn"]), _strip(model_site["fn"])
    factors = q_factors if q_factors == p_factors else 0
    if factors == 0:
        q, p = guide_site["fn"], model_site["fn"]
    scale, guide_scale = model_site["scale"], guide_site["scale"]
    if scale is not guide_scale and not (
        isinstance(scale, float | int) and isinstance(guide_scale, float | int) and scale == guide_scale
    ):
        return {}
    masks = [f.__dict__.get("_mask") for f in (guide_site["fn"], model_site["fn"]) if _unmasked(f) is not f]
    if masks and (len(masks) == 1 or masks[0] is None or masks[0] is not masks[1]):
        return {}
    if type(q).__name__ == "Kumaraswamy":  # NumPyro cuts the series off, and may be negative
        return {}
    try:
        kl = kl_divergence(q, p)
    except NotImplementedError:
        kl = _discrete_kl(q, p)
    if kl is None:
        return {}
    # the KL of a site masked by False is a plain 0.0
    kl = jnp.broadcast_to(kl, jnp.broadcast_shapes(q.batch_shape, p.batch_shape))
    kl = plates_first(_rescale(kl, model_site, layout, factors), kl.ndim - factors, layout.dims)
    factorises = factors or guide_site["fn"].event_dim == 0
    return {"kl": kl.sum(axis=-1)} | ({"kl_terms": kl} if factorises else {})


def _discrete_kl(q: Any, p: Any) -> jax.Array | None:
    """``KL(q || p)`` of two Bernoulli or two categorical distributions, of which NumPyro knows none by their logits."""
    log_q, log_p = _log_probs(q), _log_probs(p)
    if log_q is None or log_p is None or _family(q) != _family(p) or log_q.shape[-1] != log_p.shape[-1]:
        return None
    possible = log_q > -jnp.inf  # else 0 times inf
    return (jnp.exp(log_q) * jnp.where(possible, log_q - log_p, 0.0)).sum(axis=-1)


def _log_probs(fn: Any) -> Any:
    """The log probability of every state, in a last dim of their own, where :func:`_logits` knows them; else None."""
    logits = _logits(fn)
    if logits is None or _family(fn) != "Bernoulli":
        return logits
    return jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=-1)


def _kl_valid(name: str, model_trace: Any, guide_trace: Any) -> bool:
    """Everything the model's site may depend on was drawn before it in the guide.

    Every latent that precedes the site in the model counts as a possible parent: sufficient, never wrong, and it
    sees a bottom-up guide.
    """
    order = list(guide_trace)
    before = order[: order.index(name)]
    for other, site in _samples(model_trace).items():
        if other == name:
            return True
        if not site["is_observed"] and other not in before:
            return False
    return False


def _site_arrays(guide_trace: Any, model_trace: Any, layout: _Layout, analytic_kl: bool) -> dict[str, Any]:
    """One particle's arrays: observed log densities and per-site terms."""
    observed = {n: _log_prob(s, layout)[0].sum(axis=-1) for n, s in _samples(model_trace).items() if s["is_observed"]}
    sites = {name: _site(name, guide_trace, model_trace, layout, analytic_kl) for name in _samples(guide_trace)}
    return {"observed": observed, "sites": sites}


def _site(name: str, guide_trace: Any, model_trace: Any, layout: _Layout, analytic_kl: bool) -> dict[str, Any]:
    """The arrays of one :class:`Site`, by attribute."""
    site, prior = guide_trace[name], model_trace.get(name)
    kl: dict[str, Any] = {}
    if prior is not None and analytic_kl and _kl_valid(name, model_trace, guide_trace):
        kl = _analytic_kl(site, prior, layout)
        if kl and site["fn"].has_rsample:
            return kl
    guide_terms, guide_factors = _log_prob(site, layout)
    log_guide = guide_terms.sum(axis=-1)
    if prior is None:  # an auxiliary variable of the guide
        return {"log_guide": log_guide, "log_prior": jnp.zeros_like(log_guide)}
    prior_terms, prior_factors = _log_prob(prior, layout)
    arrays = {"log_guide": log_guide, "log_prior": prior_terms.sum(axis=-1)}
    if not layout.sites[name]["plain"] and not layout.sites[name]["reparameterised"]:
        arrays["score"] = _score(site, layout)
    if guide_factors and prior_factors and guide_terms.shape == prior_terms.shape:
        arrays |= {"log_prior_terms": prior_terms, "log_guide_terms": guide_terms}
    return arrays | kl | _quantisation_errors(site["fn"], layout)


def _quantisation_errors(fn: Any, layout: _Layout) -> dict[str, jax.Array]:
    """The errors of a distribution that quantises, ``(*P)`` by attribute of :class:`Site`; empty for others."""
    (base, factors), shape = _strip(fn), None
    while isinstance(base, ExpandedDistribution):
        shape, base = shape or base.batch_shape, base.base_dist
    found = getattr(base, "quantisation_errors", ())
    errors = {n: jnp.broadcast_to(e, base.batch_shape if shape is None else shape) for n, e in found}
    return {n: plates_first(e, e.ndim - factors, layout.dims).sum(axis=-1) for n, e in errors.items()}


def _marginalised(run: Callable[[Params], Any], guide_trace: Any) -> Any:
    """The model's trace with the sites summed out that ``infer={"enumerate": "parallel"}`` marks and no guide draws.

    Each later site stands in it for what it adds to the marginal (:func:`marginal_terms`).

    Args:
        run: the model's trace with these values at some latent sites.

    Raises: Refused for what cannot be summed out so, and for too many states.
    """
    traced = run({})
    samples = _samples(traced)
    names = [n for n, s in samples.items() if _is_summed_out(s) and n not in guide_trace]
    if not names:
        return traced
    placed = {n: _placed(samples[n]) for n in list(samples)[list(samples).index(names[0]) :]}
    check_summed_out(placed, names)
    states = joint_states({n: placed[n].site for n in names}, "the sites that the model sums out")

    def log_probs(state: Params) -> dict[str, jax.Array]:
        drawn = {n: samples[n]["value"] for n in names}
        found = run({n: jnp.broadcast_to(v, drawn[n].shape).astype(drawn[n].dtype) for n, v in state.items()})
        return {n: found[n]["fn"].log_prob(found[n]["value"]) for n in placed}

    each = jax.vmap(log_probs)({n: jnp.asarray(v) for n, v in states.items()})
    terms = marginal_terms({n: each[n] for n in placed}, names, placed[names[0]].dims)
    stand_ins = {n: {**traced[n], "fn": Marginal(traced[n]["fn"], x), "intermediates": None} for n, x in terms.items()}
    return {n: stand_ins.get(n, s) for n, s in traced.items() if n not in names}


def _is_summed_out(site: Any) -> bool:
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def _placed(site: Any) -> Placed:
    plates, scale = frozenset((f.name, f.dim) for f in site["cond_indep_stack"]), site["scale"]
    return Placed(Site(**_facts(site)), plates, tuple(site["fn"].batch_shape), 1.0 if scale is None else scale)


def _check_match(model_trace: Any, guide_trace: Any) -> None:
    for name, site in _samples(model_trace).items():
        if not site["is_observed"] and name not in guide_trace:
            raise must(
                "guide",
                "draw every latent site of the model",
                f"no site '{name}'",
                f"Add numpyro.sample('{name}', …) to the guide",
            )
    for name, site in _samples(guide_trace).items():
        if site["infer"].get("is_auxiliary") or (site["is_observed"] and name not in model_trace):
            continue
        if name not in model_trace:
            raise must(
                "guide",
                "draw only latent sites of the model",
                f"'{name}'",
                "Mark an auxiliary site with infer={'is_auxiliary': True}",
            )
        if site["is_observed"] or model_trace[name]["is_observed"]:
            raise must(
                "guide",
                "draw only latent sites of the model",
                f"the observed site '{name}'",
                "Remove it from the guide",
            )
    check_model_guide_match(model_trace, guide_trace)


# --- from traces to terms ---------------------------------------------------------------------------------------

OF_DREAMS, OF_PLATES, OF_CHOICES = 2**31 - 1, 2**31 - 2, 2**30
"""What is folded into a key, beside what it is split into, which is what folding in 0 and 1 gives."""


def particles(
    key: jax.Array,
    params: Params,
    model: Callable,
    guide: Callable,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_particles: int = 1,
    analytic_kl: bool = False,
    step: Any = 0,
    vectorize: bool | Callable = True,
    values: Mapping[str, jax.Array] | None = None,
) -> tuple[Terms, dict[str, Any]]:
    r"""Run guide and model for ``num_particles`` particles.

    Keys are split as in NumPyro's ``RenyiELBO`` (one for plates, then one a particle), or for one particle as in its
    ``Trace_ELBO`` (neither; but what a plate subsamples has a key of its own, in common to model and guide), so that
    equal seeds draw equal values. Every split is a loop of its own on a CPU, which beside a small model's step tells.

    Args:
        values: latents ``(K, …)`` by site in place of the guide's draws: the densities are theirs, and differentiable
            in them.

    Returns:
        The :class:`Terms` (with shapes ``(K, *P)``) and the new values of mutable sites (those of the first particle).
    """
    kwargs = dict(kwargs or {})
    if num_particles == 1:
        plate_key, keys = random.fold_in(key, OF_PLATES), key[None]  # which costs nothing where no plate subsamples
    else:
        plate_key, key = random.split(key)
        keys = random.split(key, num_particles)
    hide = ["sample", "prng_key", "control_flow"]
    model, guide = seed(model, plate_key, hide_types=hide), seed(guide, plate_key, hide_types=hide)
    layouts: list[_Layout] = []
    control_flow = _SeesControlFlow()

    def given(fn: Callable, params: Params) -> Callable:
        """With copies of mutable values: a program changes them in place, and a rerun must begin where this did."""
        return substitute(fn, data=jax.tree.map(lambda x: x, params))

    def traces(
        key: jax.Array, guide_params: Params, values: Mapping[str, jax.Array] | None
    ) -> tuple[Any, Any, dict[str, Any]]:
        model_seed, guide_seed = random.split(key)
        handler = _StopUnreparameterised() if values is None else _Assign(values)
        with handler, control_flow:
            guide_trace = trace(given(seed(guide, guide_seed), guide_params)).get_trace(*args, **kwargs)
        mutable = {n: s["value"] for n, s in guide_trace.items() if s["type"] == "mutable"}
        model_trace = run_model(replay(seed(model, model_seed), guide_trace), {**params, **mutable}, guide_trace)
        mutable |= {n: s["value"] for n, s in model_trace.items() if s["type"] == "mutable"}
        return model_trace, guide_trace, mutable

    def run_model(replayed: Callable, params: Params, guide_trace: Any) -> Any:
        """The model's trace, without the sites that are summed out of it."""

        def run(states: Params) -> Any:
            with _ChecksShapes(guide_trace):
                return trace(substitute(given(replayed, params), data=states)).get_trace(*args, **kwargs)

        return _marginalised(run, guide_trace)

    def first(key: jax.Array, values: Mapping[str, jax.Array] | None = None) -> dict[str, Any]:
        model_trace, guide_trace, mutable = traces(key, params, values)
        _check_match(model_trace, guide_trace)
        layouts.append(replace(_layout(model_trace, guide_trace), control_flow=control_flow.seen))
        arrays = _site_arrays(guide_trace, model_trace, layouts[-1], analytic_kl)
        values = {n: s["value"] for n, s in _samples(guide_trace).items() if not s["is_observed"]}
        ndims = {n: guide_trace[n]["fn"].event_dim for n in values}
        event_ndims.update(ndims)
        return arrays | {"values": values, "mutable": mutable, "recorded": _recorded(guide_trace)}

    def again(key: jax.Array, values: Mapping[str, jax.Array], ratio: jax.Array | None) -> dict[str, Any]:
        if ratio is not None:
            values = {
                n: _scale_gradient(v, _align(ratio, v.ndim - event_ndims[n], event_ndims[n], layout.dims))
                for n, v in values.items()
            }
        model_trace, guide_trace, _ = traces(key, stop_gradient(params), values)
        return _site_arrays(guide_trace, model_trace, layout, False)

    def score(key: jax.Array, values: Mapping[str, jax.Array], as_drawn: bool) -> dict[str, jax.Array]:
        with _Assign(stop_gradient(values)):
            guide_seed = random.split(key)[1]
            guide_trace = trace(given(seed(guide, guide_seed), params)).get_trace(*args, **kwargs)
        density = _score if as_drawn else lambda site, layout: _log_prob(site, layout)[0].sum(axis=-1)
        return {n: density(s, layout) for n, s in _samples(guide_trace).items()}

    def chosen(
        key: jax.Array, drawn: Params, numbers: Params, choose: Callable[[Draw], Choice], call: int
    ) -> dict[str, Any]:
        model_seed, guide_seed = random.split(key)
        chooser = _Choose(choose, drawn, numbers, random.fold_in(guide_seed, call))
        with validation_enabled(False):  # a relaxed value lies between the states
            with chooser:
                guide_trace = trace(given(seed(guide, guide_seed), params)).get_trace(*args, **kwargs)
            model_trace = run_model(replay(seed(model, model_seed), guide_trace), params, guide_trace)
            arrays = _site_arrays(guide_trace, model_trace, layout, analytic_kl)
        values = {n: s["value"] for n, s in _samples(guide_trace).items() if not s["is_observed"]}
        kept = {n: dict(c.kept) for n, c in chooser.choices.items()}
        scores = {
            n: plates_first(c.score, jnp.ndim(c.score) - _score_ndim(guide_trace[n]["fn"]), layout.dims).sum(axis=-1)
            for n, c in chooser.choices.items()
            if c.score is not None
        }
        return arrays | {"values": values, "kept": kept, "scores": scores}

    def dream(key: jax.Array) -> jax.Array:
        model_seed, guide_seed, dream_seed = random.split(key, 3)
        awake = trace(substitute(seed(guide, guide_seed), data=params)).get_trace(*args, **kwargs)
        waking = substitute(replay(seed(model, model_seed), awake), data=params)
        samples = _samples(trace(waking).get_trace(*args, **kwargs))
        places = places_of_data({n: s["value"] for n, s in samples.items() if s["is_observed"]}, args)
        asleep = trace(substitute(seed(uncondition(model), dream_seed), data=params)).get_trace(*args, **kwargs)
        new = list(args)
        for name, place in places.items():
            new[place] = asleep[name]["value"].astype(jnp.result_type(args[place]))
        latent = {n: s["value"] for n, s in _samples(asleep).items() if n not in places}
        with _Assign(stop_gradient(latent)):
            guide_trace = trace(substitute(seed(guide, guide_seed), data=params)).get_trace(
                *stop_gradient(new), **kwargs
            )
        densities = [_log_prob(s, layout)[0].sum(axis=-1) for s in _samples(guide_trace).values()]
        return sum(densities[1:], start=densities[0])

    event_ndims: dict[str, int] = {}
    calls = itertools.count(OF_CHOICES)
    each = _vectorizer(vectorize, num_particles)
    out = each(first, keys) if values is None else each(first, keys, dict(values))
    layout = layouts[-1]
    if values is not None:
        _refuse_control_flow(layout)
    drawn = out["values"]

    def refreeze(ratio: jax.Array | None) -> Terms:
        _refuse_control_flow(layout)
        frozen = (
            each(partial(again, ratio=None), keys, drawn)
            if ratio is None
            else each(again, keys, drawn, stop_gradient(ratio))
        )
        return _terms(frozen, layout, step, drawn)

    def redraw(as_drawn: bool) -> dict[str, jax.Array]:
        _refuse_control_flow(layout)
        return each(partial(score, as_drawn=as_drawn), keys, drawn)

    def rerun(choose: Callable[[Draw], Choice], numbers: Mapping[str, Any], repeat: int) -> Terms:
        _refuse_control_flow(layout)
        again_keys, values = keys, drawn
        if repeat > 1:
            again_keys, values = jax.tree.map(lambda x: jnp.repeat(x, repeat, axis=0), (keys, drawn))
        run = partial(chosen, choose=choose, call=next(calls))
        vectorised = each if len(again_keys) == num_particles else _vectorizer(vectorize, len(again_keys))
        found = vectorised(run, again_keys, values, jax.tree.map(jnp.asarray, dict(numbers)))
        return replace(_terms(found, layout, step, found["values"]), scores=found["scores"], kept=found["kept"])

    def dreamt() -> jax.Array:
        _refuse_control_flow(layout)
        return dream(random.fold_in(keys[0], OF_DREAMS))[None]

    terms = replace(
        _terms(out, layout, step, drawn),
        refreeze=refreeze,
        redraw=redraw,
        rerun=rerun,
        dreamt=dreamt,
        recorded=out["recorded"],
        data=args[0] if args else None,
        trained=params.get(_ESTIMATOR, {}),
        memory=params.get(MEMORY, {}),
    )
    return terms, jax.tree.map(lambda x: x[0], out["mutable"])


def _score_ndim(fn: Any) -> int:
    """The event dims of a site's logits: its own, and the classes of a Categorical, which its value does not have."""
    return fn.event_dim + (_family(_strip(fn)[0]) == "Categorical")


def _vectorizer(vectorize: bool | Callable, num_particles: int) -> Callable:
    if num_particles == 1:  # no batching rule in the way; the particle axis is added after
        return lambda fn, *xs: jax.tree.map(lambda y: y[None], fn(*(jax.tree.map(lambda x: x[0], x) for x in xs)))
    if vectorize is True:
        return lambda fn, *xs: jax.vmap(fn)(*xs)
    if vectorize is False:
        return lambda fn, *xs: jax.lax.map(lambda x: fn(*x), xs)
    return lambda fn, *xs: vectorize(lambda x: fn(*x), xs)


def _terms(out: dict[str, Any], layout: _Layout, step: Any, values: Mapping[str, jax.Array]) -> Terms:
    sites = {n: Site(**a, **layout.sites[n]) for n, a in out["sites"].items()}
    observed = out["observed"]
    like = next(iter([*(s.rate for s in sites.values()), *observed.values()]), None)
    if like is None:
        raise must(
            "program", "have a sample site", "none", "Add numpyro.sample statements to model and guide", InvalidArgument
        )
    log_lik = sum(observed.values(), start=jnp.zeros_like(like))
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


@jax.custom_vjp
def _scale_gradient(x: jax.Array, factor: jax.Array) -> jax.Array:
    """The identity, whose gradient is multiplied by ``factor``."""
    return x


_scale_gradient.defvjp(lambda x, factor: (x, factor), lambda factor, g: (g * factor, jnp.zeros_like(factor)))


def _align(ratio: jax.Array, batch_ndim: int, event_ndim: int, dims: tuple[int, ...]) -> jax.Array:
    """Spread ``ratio`` ``(*P)`` over a value's batch and event dims."""
    shape = [1] * (batch_ndim + event_ndim)
    for size, dim in zip(ratio.shape, dims, strict=True):
        shape[batch_ndim + dim] = size
    return ratio.reshape(shape)


@jax.custom_jvp
def _with_gradient_of(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """``value``, differentiated as ``surrogate``, whose own value may be infinite (a particle of zero weight)."""
    return value


_with_gradient_of.defjvp(lambda primals, tangents: (primals[0], tangents[1]))


def value_and_surrogate(objective: Objective, terms: Terms) -> tuple[jax.Array, jax.Array]:
    """``-scale Σ bound`` as reported, and the same value with the surrogate's gradient."""
    value = -terms.scale * stop_gradient(objective.bound(terms)).sum()
    surrogate = -terms.scale * objective.surrogate(terms).sum()
    return value, _with_gradient_of(value, surrogate)


def with_own_sites(guide: Callable, objective: Objective) -> Callable:
    """``guide`` with a step counter and what the objective's gradient estimator trains and remembers."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        mutable_site(STEP, jnp.zeros((), dtype=jnp.int32))
        with trace() as traced:
            out = guide(*args, **kwargs)
        sites = {n: Site(**_facts(s)) for n, s in _samples(traced).items()}
        trained, memory = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.result_type(float)),
            objective.gradient.initial(args[0] if args else None, sites),
        )
        if trained:
            numpyro.param(_ESTIMATOR, trained)
        if memory:
            mutable_site(MEMORY, memory)
        return out

    return counted


def check_own_sites(objective: Objective, terms: Terms) -> None:
    """Refuse a guide without the numbers that the objective's gradient estimator needs. Raises: InvalidArgument."""
    trained, memory = objective.gradient.initial(terms.data, terms.sites)
    if set(trained) - set(terms.trained) or set(memory) - set(terms.memory):
        todo = "Pass loss.guide(guide) to SVI"
        raise must("guide", "carry the numbers that its gradient estimator trains or remembers", "a plain guide", todo)


# --- drop-in loss -----------------------------------------------------------------------------------------------


class Loss(NumPyroELBO):
    r"""An elbozoo objective as a ``numpyro.infer.ELBO``, for NumPyro's own ``SVI``.

    .. code-block:: python

        svi = numpyro.infer.SVI(model, guide, optax.adam(1e-3), loss=Loss(IWAE(50)))

    Its value is minus the *unshaped* bound summed over the shared plates (times their subsample scale); its gradient
    is that of the objective's surrogate. A schedule needs a step counter, an estimator that learns numbers of its
    own: pass ``loss.guide(guide)`` to ``SVI`` in place of ``guide``.

    Plates that every site shares give per-datum weights. A site outside them (a global latent) makes one joint weight
    for the whole batch; a warning says so once.

    Args:
        objective: bound, gradient and shape.
        vectorize_particles: True for ``vmap``, False for ``lax.map`` (less memory), or a callable as in NumPyro.

    Raises: Refused at the first step for a pair of objective and site that has no right gradient.
    """

    can_infer_discrete = True  # what cannot be inferred is refused, with a better message, by the objective

    def __init__(self, objective: Objective, vectorize_particles: bool | Callable = True):
        self.objective = objective
        super().__init__(num_particles=objective.num_particles, vectorize_particles=vectorize_particles)

    def guide(self, guide: Callable) -> Callable:
        """``guide`` with a step counter (a ``mutable`` site) and the gradient estimator's own numbers."""
        return with_own_sites(guide, self.objective)

    def loss_with_mutable_state(
        self, rng_key: jax.Array, param_map: Params, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Any:
        step = param_map.get(STEP, 0)  # absent from svi.evaluate, which reports the unshaped bound and needs none
        terms, mutable = particles(
            rng_key,
            param_map,
            model,
            guide,
            args,
            kwargs,
            num_particles=self.num_particles,
            analytic_kl=self.objective.uses_analytic_kl,
            step=step,
            vectorize=self.vectorize_particles,
        )
        if self.objective.uses_step and STEP not in mutable:
            raise must(
                "guide",
                "carry a step counter under an objective with a schedule",
                "a plain guide",
                "Pass loss.guide(guide) to SVI",
            )
        self.objective.check(terms)
        check_own_sites(self.objective, terms)
        if STEP in mutable:
            mutable[STEP] = step + 1
        if MEMORY in mutable:
            mutable[MEMORY] = dict(stop_gradient(self.objective.remember(terms)))
        return {"loss": value_and_surrogate(self.objective, terms)[1], "mutable_state": mutable or None}


# --- a guide of its own for every datum -------------------------------------------------------------------------


class _Localise(Messenger):
    """Add offsets to the unconstrained parameters of latent sites' distributions."""

    def __init__(self, offsets: Mapping[str, Params], full_covariance: bool):
        self.offsets, self.full_covariance = offsets, full_covariance
        super().__init__(None)

    def process_message(self, msg: Any) -> None:
        if msg["type"] == "sample" and not msg["is_observed"] and msg["name"] in self.offsets:
            cls, count, parameters = _local_parameters(msg["name"], msg["fn"], self.full_covariance)
            offsets = self.offsets[msg["name"]]
            moved = {n: transform(value + offsets[n]) for n, (value, transform) in parameters.items()}
            msg["fn"] = cls(**moved).to_event(count)


def _full(loc: jax.Array, variance: jax.Array) -> Any:
    """The diagonal Gaussian as one with a full covariance."""
    return MultivariateNormal(loc, scale_tril=jnp.sqrt(variance)[..., None] * jnp.eye(loc.shape[-1]))


def _local_parameters(name: str, fn: Any, full_covariance: bool) -> tuple[type, int, dict[str, Any]]:
    """The class of a site's distribution, how many batch dims are events, each parameter unconstrained with its map."""
    base, count = _strip(fn)
    shape = base.batch_shape
    while isinstance(base, ExpandedDistribution):
        base = base.base_dist
    if full_covariance and type(base) is Normal and count == 1:
        base = _full(jnp.broadcast_to(base.mean, shape), jnp.broadcast_to(base.variance, shape))
        count, shape = 0, shape[:-1]
    parameters = {}
    for parameter in own_parameters(name, base):
        constraint = base.arg_constraints[parameter]
        value = getattr(base, parameter)
        value = jnp.broadcast_to(value, shape + value.shape[value.ndim - constraint.event_dim :])
        transform = biject_to(constraint)
        parameters[parameter] = transform.inv(value), transform
    check_made_of(name, type(base), {n: getattr(base, n) for n in parameters})
    return type(base), count, parameters


# --- programs ---------------------------------------------------------------------------------------------------


def _buffers(mutable: Params) -> Params:
    """The mutable values that are weights of a program, as a torch module's buffers are."""
    return {n: v for n, v in mutable.items() if n.endswith(BUFFERS)}


class _Bound:
    """A model or guide with parameters substituted, its methods too (``program.model.decode(z)``); hidden if asked."""

    def __init__(self, fn: Callable, params: Params, hidden: bool = False):
        self._fn, self._params, self._hidden = fn, params, hidden

    def _bind(self, fn: Callable) -> Callable:
        bound = substitute(fn, data=jax.tree.map(lambda x: x, self._params))  # a program may change mutable values
        return block(bound, hide_fn=lambda site: site["type"] in ("param", "mutable")) if self._hidden else bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._bind(self._fn)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._fn, name)
        return self._bind(attribute) if callable(attribute) else attribute


@dataclass(frozen=True, eq=False)
class Program:
    r"""A NumPyro model and its amortised guide, with or without trained parameters.

    ``program.model`` and ``program.guide`` are plain callables for NumPyro's own ``SVI``, ``Predictive``, handlers
    and MCMC. Once parameters are bound (by ``fit`` or ``with_weights``) they carry them, as ``param`` sites that an
    outer ``SVI`` would go on training; ``frozen()`` hides them.

    Args:
        model_fn, guide_fn: callables with the same arguments.
        spec: the zoo spec they were made from, if any.
        params: constrained parameters by site name.
        mutable: values of mutable sites (batch-norm statistics and the like).
        local_to: how many data the guide has parameters for, each for one of them (see :meth:`localised`); None for an
            amortised guide.
    """

    model_fn: Callable
    guide_fn: Callable
    spec: Any = None
    params: Params | None = None
    mutable: Params | None = None
    local_to: int | None = None

    engine = "numpyro"

    def _bind(self, fn: Callable) -> Callable:
        return fn if self.params is None else _Bound(fn, {**self.params, **(self.mutable or {})})

    @property
    def model(self) -> Callable:
        """The generative model, a NumPyro callable."""
        return self._bind(self.model_fn)

    @property
    def guide(self) -> Callable:
        """The amortised guide, a NumPyro callable."""
        return self._bind(self.guide_fn)

    def frozen(self) -> Program:
        """The same program whose parameters are constants: no ``param`` site is visible from outside.

        Raises: InvalidArgument when no parameters are bound yet.
        """
        if self.params is None:
            raise must(
                "program",
                "have parameters to freeze",
                "an untrained program",
                "Use run.program, or program.with_weights(…)",
            )
        params = self._all_params()
        model, guide = _Bound(self.model_fn, params, True), _Bound(self.guide_fn, params, True)
        return Program(model, guide, self.spec, {}, local_to=self.local_to)

    def init(self, key: jax.Array, *args: Any) -> tuple[Params, dict[str, Any], Params]:
        """Initial parameters (constrained), their constraints, and mutable values, from one run on ``args``."""
        model_seed, guide_seed = random.split(key)
        guide_trace = trace(seed(self.guide, guide_seed)).get_trace(*args)
        with _ChecksShapes(guide_trace):
            model_trace = trace(replay(seed(self.model, model_seed), guide_trace)).get_trace(*args)
        params: Params = {}
        constraints: dict[str, Any] = {}
        mutable: Params = {}
        for site in (*model_trace.values(), *guide_trace.values()):
            if site["type"] == "param":
                params[site["name"]] = site["value"]
                constraints[site["name"]] = site["kwargs"].get("constraint", numpyro.distributions.constraints.real)
            elif site["type"] == "mutable":
                mutable[site["name"]] = site["value"]
        params, mutable = jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), (params, mutable))
        return params, constraints, mutable

    @property
    def weights(self) -> dict[str, np.ndarray] | None:
        """Parameters as NumPy arrays under torch's ``state_dict`` names and layouts; ``None`` before training."""
        if self.params is None:
            return None
        return to_torch_layout(jax.tree.map(np.asarray, self.params | _buffers(self.mutable or {})), self._prefix)

    @property
    def _prefix(self) -> str:
        """What a zoo form's name puts before its parameters; torch's names go without it."""
        return getattr(self.model_fn, "prefix", "")

    def with_params(self, params: Params, mutable: Params | None = None) -> Program:
        """This program with these constrained parameters, by site name."""
        bound = replace(self, params=dict(params), mutable=mutable)
        bound.__dict__["_compiled"] = self.__dict__.setdefault(
            "_compiled", {}
        )  # parameters are arguments of what is there
        return bound

    def with_weights(self, weights: Mapping[str, np.ndarray], *example: Any) -> Program:
        """This program with the weights of a file written by either engine.

        Args:
            weights: NumPy arrays in torch's names and layouts.
            example: arguments to run the program on once, for its parameters' structure; not needed for programs of
                the zoo.
        Raises: InvalidArgument naming missing or unexpected weights and wrong shapes.
        """
        if not example:
            if self.spec is None:
                raise must(
                    "example",
                    "be given for a program without a spec",
                    "nothing",
                    "Pass a small batch of data: with_weights(weights, x)",
                )
            example = (jnp.zeros((1, self.spec.data_dim)),)
        untrained = replace(self, params=None)

        def initial(key: jax.Array) -> tuple[Params, Params]:
            params, _, mutable = untrained.init(key, *example)
            return params, mutable

        template, mutable = jax.eval_shape(initial, random.key(0))  # of parameters the shapes alone are asked for
        mutable = jax.jit(lambda key: initial(key)[1])(random.key(0)) if mutable else {}
        found = jax.tree.map(jnp.asarray, from_torch_layout(weights, {**template, **_buffers(mutable)}, self._prefix))
        params, buffers = ({n: v for n, v in found.items() if (n in template) is kept} for kept in (True, False))
        return self.with_params(params, {**mutable, **buffers} or None)

    @property
    def float_dtype(self) -> np.dtype:
        """The type of floats that the program computes in: JAX's default."""
        return np.dtype(jnp.result_type(float))

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
        """``fn(terms)`` on the data ``args``, compiled once a shape; a tree of NumPy arrays.

        Args:
            fn: a function of :class:`Terms`; one object, not a lambda a call, or each call is compiled anew.
            args: the data.
            num_particles: K fresh particles, where no values are given.
            seed: of the particles.
            analytic_kl: use closed forms of the KL where they are valid.
            values: latents ``(K, …)`` by site to take the densities at, in place of fresh draws.
        """
        num_particles = num_particles if values is None else len(next(iter(values.values())))
        cache = self.__dict__.setdefault("_compiled", {})
        key = (fn, num_particles, analytic_kl, values is None)
        if key not in cache:

            def compute(seed: Any, params: Params, args: tuple, values: Any) -> Any:
                terms, _ = particles(
                    random.key(seed),
                    params,
                    self.model_fn,
                    self.guide_fn,
                    args,
                    num_particles=num_particles,
                    analytic_kl=analytic_kl,
                    values=values,
                )
                return fn(terms)

            cache[key] = jax.jit(compute)
        given = None if values is None else dict(values)
        with products_in_full():
            return jax.tree.map(np.asarray, cache[key](seed, self._all_params(), args, given))

    def log_density(self, values: Mapping[str, np.ndarray], args: tuple) -> np.ndarray:
        """``log p(x, z)`` of the whole data ``args`` at latents ``(K, …)``, scales included, ``(K,)``, nats.

        Of the model alone: the guide is not run.
        """
        cache = self.__dict__.setdefault("_compiled", {})
        if "log_density" not in cache:

            def compute(params: Params, values: Any, args: tuple) -> Any:
                model = seed_handler(self.model_fn, random.key(0))  # a plate draws its subsample, of all it is given

                def one(z: Any) -> Any:
                    density, found = log_density(model, args, {}, {**params, **z})
                    refuse_summed_out(n for n, s in _samples(found).items() if _is_summed_out(s) and n not in z)
                    return density

                return jax.lax.map(one, values)

            cache["log_density"] = jax.jit(compute)
        with products_in_full():
            return np.asarray(cache["log_density"](self._all_params(), dict(values), args))

    def localised(self, args: tuple, full_covariance: bool = False) -> Program:
        """This program with constant parameters and a guide that is optimised for each datum of ``args`` by itself.

        Each parameter of each latent's distribution gets an offset a datum, unconstrained, to be trained: the
        amortised guide is where they are all 0. A site that depends on others keeps its network of them.

        Args:
            args: the data; the result is for these alone, in this order.
            full_covariance: let diagonal Gaussians become full ones.
        Raises: InvalidArgument for a site whose distribution has no parameters of its own (a flow).
        """
        frozen, shapes = self.frozen(), {}

        def look(args: tuple) -> None:
            for name, site in _samples(trace(seed(frozen.guide, 0)).get_trace(*args)).items():
                if not site["is_observed"]:
                    parameters = _local_parameters(name, site["fn"], full_covariance)[2]
                    shapes[name] = {n: value.shape for n, (value, _) in parameters.items()}

        jax.eval_shape(look, args)

        def guide(*args: Any) -> Any:
            offsets = {
                name: {n: numpyro.param(f"{name}.local_{n}", jnp.zeros(shape)) for n, shape in each.items()}
                for name, each in shapes.items()
            }
            with _Localise(offsets, full_covariance):
                return frozen.guide(*args)

        return Program(frozen.model, guide, local_to=len(args[0]))

    def outline(self, args: tuple, objective: Objective | None = None) -> Terms:
        """The :class:`Terms` as shapes, supports and flags, of one particle or of an objective's: nothing is computed.

        Raises: what ``objective.check`` does.
        """
        num_particles = 1 if objective is None else objective.num_particles
        found: list[Terms] = []

        def look(params: Params, args: tuple) -> None:
            run = particles(random.key(0), params, self.model_fn, self.guide_fn, args, num_particles=num_particles)
            found.append(run[0])
            if objective is not None:
                objective.check(found[0])

        jax.eval_shape(look, self._all_params(), args)
        return found[0]

    def guide_parameters(self, args: tuple) -> frozenset[str]:
        """Sites of the parameters that the guide alone uses."""
        found: list[set[str]] = []

        def look(args: tuple) -> None:
            guide_trace = trace(seed(self.guide, 0)).get_trace(*args)
            model_trace = trace(replay(seed(self.model, 1), guide_trace)).get_trace(*args)
            found.extend({n for n, s in tr.items() if s["type"] == "param"} for tr in (guide_trace, model_trace))

        jax.eval_shape(look, args)
        return frozenset(found[0] - found[1])

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
        cache = self.__dict__.setdefault("_compiled", {})
        if (key := ("predict", num_particles, prior, values is None)) not in cache:

            def one(key: jax.Array, params: Params, args: tuple, values: Any) -> Any:
                model_key, guide_key, draw_key = random.split(key, 3)
                model = substitute(seed_handler(self.model_fn, model_key), data={**params, **(values or {})})
                if not prior and values is None:
                    seeded = substitute(seed_handler(self.guide_fn, guide_key), data=params)
                    guide_trace = trace(seeded).get_trace(*args)
                    model = replay(model, guide_trace)
                out: dict[str, dict[str, Any]] = {"latent": {}, "observed": {}, "mean": {}}
                samples, known = _samples(trace(model).get_trace(*args)), values or {}
                if not prior and values is None:
                    known = guide_trace
                refuse_summed_out(n for n, s in samples.items() if not prior and _is_summed_out(s) and n not in known)
                for i, (name, site) in enumerate(samples.items()):
                    if not site["is_observed"]:
                        out["latent"][name] = site["value"]
                    elif site["fn"].shape():
                        out["observed"][name] = site["fn"].sample(random.fold_in(draw_key, i))
                        with contextlib.suppress(NotImplementedError):  # not every distribution has a mean
                            out["mean"][name] = site["fn"].mean
                return out

            cache[key] = jax.jit(
                lambda s, params, args, values: jax.vmap(lambda k, v: one(k, params, args, v))(
                    random.split(random.key(s), num_particles), values
                )
            )
        with products_in_full():
            return jax.tree.map(np.asarray, cache[key](seed, self._all_params(), args, values))

    def _all_params(self) -> Params:
        if self.params is None:
            raise must(
                "program",
                "have trained parameters",
                "an untrained program",
                "Call fit(program, data) first, or program.with_weights(…)",
            )
        return {**self.params, **(self.mutable or {})}
