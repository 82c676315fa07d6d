"""Data that a program makes, in the place of its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.posterior import may_be


def places(
    program: Any, arrays: tuple[np.ndarray, ...], observed: Mapping[str, int] | None, seed: int, caller: str
) -> dict[str, int]:
    """By observed site, in the model's order, which argument of the program holds its data.

    Args:
        program: a trained program of either engine.
        arrays: its data, one array an argument.
        observed: what the user knows of it: by site, the argument.
        seed: of the draws that are tried.
        caller: name of the function with the argument ``observed``, for messages.

    Raises: InvalidArgument where it cannot be told, and for a latent that is drawn given observed data (no draw of the
        model then starts with its latents).
    """
    if program.local_to is not None:
        todo = "Pass the program with the amortised guide"
        raise must("guide", f"be one for any data under {caller}", "one optimised for data of its own", todo)
    out = program.predict(arrays, seed=seed, prior=True)
    for name, z in out["latent"].items():
        if z.shape[1:2] != (len(arrays[0]),):
            todo = "Move it into the data plate, and other plates to the right of that or into event dims"
            got = f"shape {z.shape[1:]} for {len(arrays[0])} data"
            raise must(f"site '{name}'", "have the data along its first dim", got, todo)
    shapes = {name: x.shape[1:] for name, x in out["observed"].items()}
    candidates, places = may_be(arrays, shapes), dict(observed or {})
    for name, place in places.items():
        if name not in shapes:
            raise must("observed", f"name observed sites, among {sorted(shapes)}", repr(name), "Rename or drop it")
        if place not in candidates[name]:
            todo = "Count the program's arguments from 0"
            got = repr(place)
            raise must(f"observed[{name!r}]", f"be an argument of shape {shapes[name]}", got, todo)
    for name, found in candidates.items():
        if name not in places:
            if len(found) != 1:
                got = f"{len(found)} arguments of shape {shapes[name]}, among {[a.shape for a in arrays]}"
                todo = (
                    f"Say which: {caller}(…, observed={{{name!r}: 0}})" if found else "Pass the data as the site has it"
                )
                raise must(f"site '{name}'", "be observed at one argument of the program", got, todo)
            places[name] = found[0]
    if not places:
        raise must("program", "have an observed site", "none", "Give it one: sample('x', …, obs=x)")
    if len(set(places.values())) < len(places):
        raise must("observed", "give each site an argument of its own", places, "Say which is which with observed=")
    where = {name: places[name] for name in shapes}
    _check_latents_come_first(program, arrays, where, out, seed)
    return where


def _check_latents_come_first(
    program: Any, arrays: tuple[np.ndarray, ...], where: Mapping[str, int], out: Any, seed: int
) -> None:
    """Equal seeds draw equal latents, whatever the data are, unless a latent depends on them."""
    new = list(arrays)
    for name, place in where.items():
        new[place] = out["observed"][name][0].astype(arrays[place].dtype, copy=False)
    again = program.predict(tuple(new), seed=seed, prior=True)["latent"]
    for name, z in out["latent"].items():
        if not np.array_equal(z, again[name], equal_nan=True):
            todo = "Leave this instrument out: a model that starts from data cannot be simulated by it"
            raise must(f"site '{name}'", "be drawn before what is observed", "one that depends on it", todo)


def simulate(
    program: Any, args: tuple[np.ndarray, ...], where: Mapping[str, int], seed: int
) -> tuple[dict[str, np.ndarray], tuple[np.ndarray, ...]]:
    """One draw a datum from the model: latents ``(1, B, …)``, and the arguments with observed sites' draws in place."""
    new = list(args)
    latent: dict[str, np.ndarray] | None = None
    for i, (name, place) in enumerate(where.items()):  # a later one may depend on the one before
        out = program.predict(tuple(new), seed=(seed + i) % 2**31, prior=latent is None, values=latent)
        latent = out["latent"] if latent is None else latent
        new[place] = out["observed"][name][0].astype(args[place].dtype, copy=False)
    assert latent is not None
    return latent, tuple(new)
