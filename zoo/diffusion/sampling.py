r"""Drawing from a trained diffusion, and its probability flow.

The flow is the ordinary differential equation whose solutions have the marginals of the noising path. In the log
signal-to-noise ratio it is ``dz / d log_snr = (sigma^2 z - sigma e_said(z, log_snr)) / 2``, whatever the schedule: only
its ends count.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import must
from elbozoo.inference.parts import one_of, positive, whole_number

SAMPLERS = ("ancestral", "ddim", "flow")


def draw(
    program: Any,
    num_data: int,
    *,
    sampler: Literal["ancestral", "ddim", "flow"] = "ancestral",
    num_steps: int = 250,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Float[np.ndarray, "N D"]:
    r"""Draws of x from a diffusion, by any of three ways back from noise.

    Args:
        program: a trained ``DiffusionVAE`` or ``VariationalDiffusion`` of either engine.
        num_data: N.
        sampler: "ancestral": ``p(z_s | z_t)`` in equal steps of time, the model itself where there are as many as it
            has; "ddim": the same steps without their noise; "flow": the probability flow, solved to ``tolerance``.
        num_steps: of the first two.
        tolerance: relative and absolute, of the flow's solver.
        seed: equal arguments give equal draws.

    Returns: (N, data_dim): from ``p(x | z_0)``.
    Raises: InvalidArgument.
    References: Song, Meng & Ermon 2021 (arXiv 2010.02502), eq. 12, eta = 0; Song et al. 2021 (arXiv 2011.13456),
        section 4.3.

    Example:
        >>> from elbozoo.zoo import ExactNormal, GaussianDenoiser, VariationalDiffusion
        >>> spec = VariationalDiffusion(2, GaussianDenoiser(), "signal", likelihood=ExactNormal())
        >>> draw(spec.numpyro().with_weights({}), 3, num_steps=5).shape
        (3, 2)
    """
    whole_number("num_data", num_data)
    one_of("sampler", sampler, SAMPLERS)
    whole_number("num_steps", num_steps)
    positive("tolerance", tolerance)
    whole_number("seed", seed, 0)
    return _form(program).draw(program, num_data, sampler, num_steps, tolerance, seed)


def flow_log_prob(
    program: Any, z: Any, *, num_probes: int | None = None, tolerance: float = 1e-5, seed: int = 0
) -> Float[np.ndarray, " N"]:
    r"""The exact log density of z_0 under the probability flow, nats.

    .. math:: \log p(z_0) = \log N(z_1; 0, I) + \int \operatorname{tr} \frac{\partial f}{\partial z} \, d\, log\_snr

    from the schedule's first end to its last, f being the flow.

    Args:
        program: a trained ``DiffusionVAE`` or ``VariationalDiffusion`` of either engine.
        z: (N, data_dim), at the schedule's first end.
        num_probes: random directions for the trace (Hutchinson's estimate, unbiased in log p); None for all of them,
            which is exact and costs data_dim passes.
        tolerance: relative and absolute, of the solver, over all data together.
        seed: of the probes.

    Returns: (N,). Raises: InvalidArgument.
    References: Song et al. 2021 (arXiv 2011.13456), section 4.3, eq. 39; Grathwohl et al. 2019 (arXiv 1810.01367),
        section 3.1. Solved by diffrax and by torchdiffeq.
    """
    form = _form(program)
    if num_probes is not None:
        whole_number("num_probes", num_probes)
    positive("tolerance", tolerance)
    array = np.asarray(z, program.float_dtype)
    if array.ndim != 2 or array.shape[1] != program.spec.data_dim:
        raise must("z", f"have shape (N, {program.spec.data_dim})", array.shape, "Pass one latent a row")
    return form.flow_log_prob(program, array, num_probes, tolerance, seed)


def flow_bound(
    program: Any, data: Any, *, num_probes: int | None = 1, tolerance: float = 1e-5, seed: int = 0
) -> Float[np.ndarray, " N"]:
    r"""A bound on ``log p(x)`` with the flow for a prior: one draw of z_0 a datum, nats.

    .. math:: E_{q(z_0 | x)} [\log p(x | z_0) + \log p_{flow}(z_0) - \log q(z_0 | x)]

    The flow and the chain are two models with the same marginals only where the denoiser is exact.

    Args: as for :func:`flow_log_prob`, with data for z.

    Returns: (N,); its mean over data and draws is the bound. Raises: InvalidArgument.
    """
    form = _form(program)
    (x,) = prepare_to_measure(program, data)
    z, difference = form.end(program, x, seed)
    return difference + flow_log_prob(program, z, num_probes=num_probes, tolerance=tolerance, seed=seed)


def _form(program: Any) -> Any:
    """The file with this program's engine."""
    if not hasattr(program.spec, "denoiser") or hasattr(program.spec, "vae"):
        got = "a program without a spec" if program.spec is None else type(program.spec).__name__
        raise must("program", "be a diffusion of data", got, "Train a DiffusionVAE or VariationalDiffusion")
    return importlib.import_module(f"elbozoo.zoo.diffusion.sampling_{program.engine}")
