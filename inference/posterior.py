"""Posterior draws in the groups that ArviZ users expect."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from elbozoo._version import __version__
from elbozoo.inference.arrays import logsumexp, softmax
from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import NonFinite, must
from elbozoo.inference.evaluation import call_seed, call_size, check_plate, weigh
from elbozoo.inference.parts import whole_number
from elbozoo.inference.psis import pareto_k
from elbozoo.inference.terms import Terms

Variable = tuple[tuple[str, ...], np.ndarray]
"""Dims and values; those that begin with ``draw`` get a chain of one."""

Variables = dict[str, Variable]
"""A group, by variable."""

_POSTERIOR, _PREDICTIVE, _PRIOR, _RESAMPLE = range(4)  # streams of random numbers


def to_arviz(
    program: Any,
    data: Any,
    *,
    num_draws: int = 500,
    seed: int = 0,
    resample: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    r"""Draws from a program, as ArviZ's ``InferenceData`` (ArviZ 0.23) or as an xarray ``DataTree`` (ArviZ 1.x).

    Groups:
        posterior: draws of the latents from the guide, ``z ~ q(z | x)``.
        posterior_resampled: the same draws, resampled with replacement in proportion to their importance weights
            ``p(x, z) / q(z | x)``, for each datum by itself: nearer to the model's true posterior where the guide is
            off, and no better than the guide where ``pareto_k`` is above 0.7. It is an extra group, which functions
            of ArviZ read by name: ``arviz.summary(idata, group="posterior_resampled")``.
        sample_stats: ``log_weight`` of each draw of ``posterior``, and per datum the weights' ``pareto_k`` and ``ess``.
        log_likelihood: ``log p(x | z)`` of each draw of ``posterior``.
        posterior_predictive: new data from ``q(z | x) p(x | z)``, each from the draw of ``posterior`` at its place.
        prior, prior_predictive: latents and data from the model.
        observed_data: ``data``.

    Dims: ``chain`` (of size 1), ``draw``, ``data`` for the plate, ``<site>_dim`` for a latent's own axis
    (``<site>_dim_0``, … where it has several), and for an observation ``pixel``, or ``height`` and ``width`` (after
    ``channel`` where there is more than one) where the spec knows an image shape, or ``<site>_dim`` without a spec. A
    slash in a scoped site's name becomes a dot.

    Do not measure or rank models by ``arviz.loo`` on these draws. Each ``z_n`` belongs to one ``x_n``: with ``x_n``
    left out nothing is known of ``z_n``, so its leave-one-out posterior is the prior, far from the draws, which were
    made by looking at ``x_n``. That is the harmonic-mean estimate of ``p(x_n)``: its weights are hopeless (their k̂ says
    so) and what comes out is mostly reconstruction, optimistic by up to the rate. Use
    :func:`elbozoo.inference.evaluation.evaluate` on held-out data.

    A program that draws one of its steps (a diffusion, see ``evaluate``) has no weights: ``sample_stats`` is empty,
    there is no ``posterior_resampled``, and the prior groups, each draw of which is a chain, hold one draw a datum.

    Draws are independent and exactly the guide's: R-hat and the effective sample size of ``posterior`` always look
    well. What can be wrong is the guide, and ``pareto_k`` is what tells.

    Args:
        program: a trained program of either engine.
        data: as for ``evaluate``. Keep it small: predictive groups hold ``num_draws`` copies of it.
        num_draws: draws of each latent.
        seed: equal arguments give equal draws.
        resample: whether to add ``posterior_resampled``.
        coords: coordinates by dim (``{"data": labels}``); 0, 1, 2, … for the rest.
        dims: by variable, the names of its dims after chain and draw, in place of those above.

    Returns: ``InferenceData`` or ``DataTree``; its root and its groups have the library, its version, the engine, the
        model, ``num_draws`` and the seed as attributes. A program with a joint weight (see ``evaluate``) has no
        ``data`` dim in ``sample_stats`` and ``log_likelihood``.
    Raises: InvalidArgument for bad data, or for dims and coords that do not fit; NonFinite for weights that are nan or
        all zero.
    """
    whole_number("num_draws", num_draws)
    whole_number("seed", seed, least=0)
    arrays = prepare_to_measure(program, data)
    _, chunk = call_size(arrays, num_draws, len(arrays[0]))

    def ancestral(size: int, seed: int) -> dict[str, Any]:
        out = program.predict(arrays, num_particles=size, seed=seed, prior=True)
        return {"latent": out["latent"], "observed": out["observed"]}

    weighs = not program.outline(arrays).estimated
    prior = _gather(ancestral, *((num_draws, chunk) if weighs else (1, 1)), seed, _PRIOR)
    shapes = {name: z.shape[1:] for name, z in prior["latent"].items()}

    def draw(size: int, seed: int) -> dict[str, Any]:
        out = program.apply(_draws, arrays, num_particles=size, seed=seed)
        # Pyro keeps a plate that a site is not in as a dim of size 1; a run of the model alone has its own shape.
        values = {name: z.reshape(size, *shapes.get(name, z.shape[1:])) for name, z in out["values"].items()}
        of_model = {name: values[name] for name in shapes}
        noise = call_seed(seed, _PREDICTIVE, 0)  # not the draws' own: torch would draw x with the noise of z
        new = program.predict(arrays, num_particles=size, seed=noise, values=of_model)
        return out | {"values": values, "predictive": new["observed"]}

    drawn = _gather(draw, num_draws, chunk, seed, _POSTERIOR)
    posterior, predictive = drawn["values"], drawn["predictive"]
    check_plate(drawn["log_lik"], len(arrays[0]))
    log_weight = weigh(drawn["log_lik"], drawn["rate"])
    if (impossible := ~np.isfinite(log_weight.max(axis=0))).any():
        got = f"{int(impossible.sum())} data (the first at {int(np.argmax(impossible))}) of likelihood 0 at every draw"
        raise must(
            "data", "be possible under the model", got, "Drop them, or look at the likelihood's scale", NonFinite
        )

    names = _Names(program.spec, len(arrays[0]), dims or {})
    plates = ("draw", "data")[: log_weight.ndim]
    groups: dict[str, Variables] = {"posterior": names.latents(posterior)}
    if resample and weighs:
        chosen = resampled(log_weight, np.random.default_rng([seed, _RESAMPLE]))
        groups["posterior_resampled"] = names.latents({name: _take(z, chosen) for name, z in posterior.items()})
    groups |= {
        "posterior_predictive": names.observations(predictive),
        "log_likelihood": {name: (plates, log_lik) for name, log_lik in drawn["observed"].items()},
        "sample_stats": {
            "log_weight": (plates, log_weight),
            "pareto_k": (plates[1:], pareto_k(log_weight)),
            "ess": (plates[1:], effective_draws(log_weight)),
        }
        if weighs
        else {},
        "prior": names.latents(prior["latent"]),
        "prior_predictive": names.observations(prior["observed"]),
        "observed_data": names.data(arrays, predictive),
    }
    attrs = attributes(program, num_draws, seed)
    return _wrap(_datasets(groups, coords or {}, attrs), attrs)


def attributes(program: Any, num_draws: int, seed: int) -> dict[str, Any]:
    """What every group and its container say of where they come from."""
    return {
        "inference_library": "elbozoo",
        "inference_library_version": __version__,
        "engine": program.engine,
        "model": "" if program.spec is None else type(program.spec).__name__,
        "num_draws": num_draws,
        "seed": seed,
    }


def _wrap(groups: Mapping[str, Any], attrs: Mapping[str, Any]) -> Any:
    """The container of the installed ArviZ: the one place where its versions differ."""
    if version("arviz").startswith("0."):
        import arviz  # here, for it takes seconds and 1.x has no need of it

        inference_data: Any = arviz.InferenceData
        return inference_data(attrs=dict(attrs), **groups)
    import xarray

    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs = dict(attrs)
    return tree


# --- draws ------------------------------------------------------------------------------------------------------


def _draws(terms: Terms) -> dict[str, Any]:
    return {
        "values": dict(terms.values),
        "observed": dict(terms.observed),
        "log_lik": terms.log_lik,
        "rate": {name: site.sampled_rate for name, site in terms.sites.items()},
    }


def _gather(call: Callable[[int, int], Any], num_draws: int, chunk: int, seed: int, stream: int) -> Any:
    """The results of calls of ``chunk`` draws (one shape, one compilation), joined along axis 0 and cut to length."""
    parts = [call(chunk, call_seed(seed, stream, i)) for i in range(math.ceil(num_draws / chunk))]
    return _join(parts, num_draws)


def _join(parts: list[Any], num_draws: int) -> Any:
    if isinstance(parts[0], dict):
        return {key: _join([part[key] for part in parts], num_draws) for key in parts[0]}
    return np.concatenate(parts)[:num_draws]


def effective_draws(log_weight: np.ndarray) -> np.ndarray:
    """``(Σ w)² / Σ w²`` along axis 0; nan where all weights are zero."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.exp(2.0 * logsumexp(log_weight) - logsumexp(2.0 * log_weight)))


def resampled(log_weight: np.ndarray, rng: np.random.Generator, num_draws: int | None = None) -> np.ndarray:
    """Indices of S draws taken from K with replacement in proportion to their weights, for each datum by itself.

    Systematic resampling: a draw of normalised weight w is taken ``S w`` times, rounded down or up, in random order.
    S is ``num_draws``, or K.

    Shapes: ``log_weight`` ``(K,)`` or ``(K, B)``, the result ``(S,)`` or ``(S, B)``.
    """
    flat = log_weight.reshape(log_weight.shape[0], -1)
    num_data, num_draws = flat.shape[1], num_draws or len(flat)
    edges = np.cumsum(softmax(flat), axis=0)
    edges[-1] = 1.0  # not a rounding below
    points = (np.arange(num_draws)[:, None] + rng.random(num_data)) / num_draws
    chosen = np.stack([np.searchsorted(e, p, side="right") for e, p in zip(edges.T, points.T, strict=True)], axis=1)
    return rng.permuted(chosen, axis=0).reshape(num_draws, *log_weight.shape[1:])


def _take(z: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """``z`` ``(K, *P, ...)`` at the chosen draws ``(K, *P)``."""
    return np.take_along_axis(z, chosen.reshape(chosen.shape + (1,) * (z.ndim - chosen.ndim)), axis=0)


# --- names ------------------------------------------------------------------------------------------------------


class _Names:
    """Which dims a site's values have."""

    def __init__(self, spec: Any, num_data: int, dims: Mapping[str, Sequence[str]]):
        self.num_data, self.dims, self.has_spec = num_data, dims, spec is not None
        shape = getattr(spec, "image_shape", None) or getattr(getattr(spec, "network", None), "image_shape", None) or ()
        self.image_shape: tuple[int, ...] = tuple(shape[1:] if len(shape) == 3 and shape[0] == 1 else shape)

    def latents(self, values: Mapping[str, np.ndarray], lead: tuple[str, ...] = ("draw",)) -> Variables:
        return {name: self._named(name, z, lead, ()) for name, z in values.items()}

    def observations(self, values: Mapping[str, np.ndarray]) -> Variables:
        return {name: self._observation(name, x, ("draw",)) for name, x in values.items()}

    def data(self, arrays: Sequence[np.ndarray], like: Mapping[str, np.ndarray]) -> Variables:
        """Each observed site takes the first argument of the program that has its shape and no site yet."""
        out: Variables = {}
        taken: set[int] = set()
        for name, candidates in may_be(arrays, {name: draws.shape[1:] for name, draws in like.items()}).items():
            at = next((i for i in candidates if i not in taken), None)
            if at is not None:
                out[name] = self._observation(name, arrays[at], ())
                taken.add(at)
        return out

    def _observation(self, name: str, x: np.ndarray, lead: tuple[str, ...]) -> Variable:
        shape: tuple[int, ...] = x.shape
        flat = shape[len(lead) : -1] == (self.num_data,)
        if flat and self.image_shape and math.prod(self.image_shape) == shape[-1]:
            x = x.reshape(*shape[:-1], *self.image_shape)
            return self._named(name, x, lead, ("channel", "height", "width")[-len(self.image_shape) :])
        return self._named(name, x, lead, ("pixel",) if flat and self.has_spec else ())

    def _named(self, name: str, values: np.ndarray, lead: tuple[str, ...], event: tuple[str, ...]) -> Variable:
        shape = values.shape[len(lead) :]
        if name in self.dims:
            own = tuple(self.dims[name])
            if len(own) != len(shape):
                todo = "Name every dim after chain and draw"
                raise must(f"dims[{name!r}]", f"have {len(shape)} names, for shape {shape}", list(own), todo)
            return lead + own, values
        plate = ("data",) if shape[:1] == (self.num_data,) else ()
        count = len(shape) - len(plate)
        numbered = (f"{name}_dim",) if count == 1 else tuple(f"{name}_dim_{i}" for i in range(count))
        return lead + plate + (event or numbered), values


def may_be(arrays: Sequence[np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[int]]:
    """By observed site, which arguments of the program have its shape: one of them is its data."""
    return {name: [i for i, a in enumerate(arrays) if a.shape == shape] for name, shape in shapes.items()}


def _datasets(
    groups: Mapping[str, Variables], coords: Mapping[str, Sequence[Any]], attrs: Mapping[str, Any]
) -> dict[str, Any]:
    """An ``xarray.Dataset`` a group."""
    import xarray  # here, for it brings pandas, which takes a second

    groups = {group: {n: _chained(v) for n, v in variables.items()} for group, variables in groups.items()}
    sizes: dict[str, int] = {}
    for variables in groups.values():
        for dims, values in variables.values():
            for dim, size in zip(dims, values.shape, strict=True):
                if sizes.setdefault(dim, size) != size and not (dim == "draw" and size == 1):  # of a diffusion's prior
                    raise must(
                        f"dim {dim!r}", "have one size everywhere", (sizes[dim], size), "Name one of them with dims="
                    )
    for name, values in coords.items():
        if name not in sizes:
            raise must("coords", f"name dims among {sorted(sizes)}", repr(name), "Rename or drop it")
        if len(values) != sizes[name]:
            raise must(f"coords[{name!r}]", f"have {sizes[name]} entries", len(values), "Give one for each index")
    index = {name: np.asarray(coords.get(name, np.arange(size))) for name, size in sizes.items()}
    out = {}
    for group, variables in groups.items():
        data = {}
        for name, (dims, values) in variables.items():
            data[name.replace("/", ".")] = (dims, values)  # a slash in a name is a path to xarray and netCDF
        used = {dim: size for dims, values in data.values() for dim, size in zip(dims, values.shape, strict=True)}
        out[group] = xarray.Dataset(data, coords={dim: index[dim][:n] for dim, n in used.items()}, attrs=dict(attrs))
    return out


def _chained(variable: Variable) -> Variable:
    dims, values = variable
    return (("chain", *dims), values[None]) if dims[:1] == ("draw",) else variable
