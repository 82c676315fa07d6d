"""Data that a program makes, in the place of its data."""

from __future__ import annotations

from typing import Any

import numpy as np

from elbozoo.inference.errors import must


def simulate(
    program: Any, like: tuple[np.ndarray, ...], seed: int
) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
    """One draw ``(z, x)`` from the model for each datum of ``like``.

    Args:
        program: a trained program of either engine.
        like: data, one array an argument of the program, whose shapes the draws have.
        seed: equal arguments give equal draws.

    Returns: the arguments with each observed site's draw in the place of its data (the first argument of its shape that
        no site has yet), and the latents ``(N, …)`` by site.
    Raises: InvalidArgument where an observed site has the shape of no argument.
    """
    drawn = program.predict(like, seed=seed, prior=True)
    arrays, free = list(like), list(range(len(like)))
    for name, draws in drawn["observed"].items():
        at = next((i for i in free if like[i].shape == draws.shape[1:]), None)
        if at is None:
            shapes = [like[i].shape for i in free]
            todo = "Pass each observed site's data as an argument of model and guide"
            raise must(
                f"site '{name}'", f"be one of the program's arguments, of shapes {shapes}", draws.shape[1:], todo
            )
        free.remove(at)
        arrays[at] = draws[0].astype(like[at].dtype)
    return tuple(arrays), {name: z[0] for name, z in drawn["latent"].items()}
