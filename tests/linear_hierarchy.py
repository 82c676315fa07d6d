"""The linear-Gaussian hierarchy of three layers in NumPy alone: its marginal, posterior and guides are joint Gaussians.

``z3 ~ N(0, I)``, ``z2 | z3 ~ N(W2 z3 + c2, S2)``, ``z1 | z2 ~ N(W1 z2 + c1, S1)``, ``x | z1 ~ N(W0 z1 + c0, s2 I)``, S
diagonal. As weights of a zoo model without hidden layers: a decoder's locations are ``W`` and ``c``, its log scales
constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.stats import multivariate_normal

from elbozoo.guides.full_covariance_gaussian import lower_triangle


class Affine(NamedTuple):
    """``y | u ~ N(matrix u + offset, covariance)``."""

    matrix: np.ndarray
    offset: np.ndarray
    covariance: np.ndarray


class Joint(NamedTuple):
    mean: np.ndarray
    covariance: np.ndarray


@dataclass(frozen=True)
class LinearHierarchy:
    """``steps[l]`` gives layer l (0 is the data) from the layer above; ``dims`` are the latents', z1 first."""

    steps: tuple[Affine, ...]

    @classmethod
    def random(cls, data_dim: int, dims: tuple[int, ...], seed: int = 0) -> LinearHierarchy:
        rng = np.random.default_rng(seed)
        steps = []
        for rows, columns in zip((data_dim, *dims[:-1]), dims, strict=True):
            variance = np.full(rows, 0.6**2) if not steps else rng.uniform(0.3, 0.9, rows)
            steps.append(Affine(rng.normal(size=(rows, columns)), rng.normal(size=rows), np.diag(variance)))
        return cls(tuple(steps))

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(step.matrix.shape[1] for step in self.steps)

    def joint(self) -> Joint:
        """Of ``(z_L, …, z1, x)`` stacked in this order."""
        top = self.dims[-1]
        joint = Joint(np.zeros(top), np.eye(top))
        for step in reversed(self.steps):
            joint = extend(joint, step, slice(len(joint.mean) - step.matrix.shape[1], None))
        return joint

    def log_evidence(self, x: np.ndarray) -> np.ndarray:
        mean, covariance = self.joint()
        size = x.shape[1]
        return multivariate_normal(mean[-size:], covariance[-size:, -size:]).logpdf(x)

    def posterior(self, x: np.ndarray) -> Joint:
        """Of ``(z_L, …, z1)`` given one datum."""
        return condition(self.joint(), x)

    def climb(self) -> list[Affine]:
        """The exact ``p(z1 | x)``, ``p(z2 | z1)``, …: each layer given the one below, from the joint's blocks."""
        joint, out = self.joint(), []
        ends = len(joint.mean) - np.cumsum((0, self.steps[0].matrix.shape[0], *self.dims))
        blocks = [slice(a, b) for b, a in zip(ends, ends[1:], strict=False)]  # x, z1, z2, …
        for below, block in zip(blocks, blocks[1:], strict=False):
            gain = np.linalg.solve(joint.covariance[below, below], joint.covariance[below, block]).T
            offset = joint.mean[block] - gain @ joint.mean[below]
            out.append(Affine(gain, offset, joint.covariance[block, block] - gain @ joint.covariance[below, block]))
        return out

    def decoder_weights(self) -> dict[str, np.ndarray]:
        (first, *rest), out = self.steps, {}
        out["decoders.0.layers.0.weight"], out["decoders.0.layers.0.bias"] = first.matrix, first.offset
        for i, step in enumerate(rest, start=1):
            log_scale = 0.5 * np.log(np.diag(step.covariance))
            out[f"decoders.{i}.layers.0.weight"] = np.concatenate([step.matrix, np.zeros_like(step.matrix)])
            out[f"decoders.{i}.layers.0.bias"] = np.concatenate([step.offset, log_scale])
        return out


def encoder_weights(layers: list[Affine], full: bool = False, softplus: bool = False) -> dict[str, np.ndarray]:
    """Encoders without hidden layers whose locations are affine and whose scales (or variances) are constants."""
    out = {}
    for i, (matrix, offset, covariance) in enumerate(layers):
        if full:
            tril = np.linalg.cholesky(covariance)
            np.fill_diagonal(tril, np.log(np.diag(tril)))
            rest = tril[np.tril_indices(len(offset))]
            assert (lower_triangle(len(offset))[np.tril_indices(len(offset))] == np.arange(len(rest))).all()
        elif softplus:
            rest = np.log(np.expm1(np.diag(covariance)))
        else:
            rest = 0.5 * np.log(np.diag(covariance))
        out[f"encoders.{i}.layers.0.weight"] = np.concatenate([matrix, np.zeros((len(rest), matrix.shape[1]))])
        out[f"encoders.{i}.layers.0.bias"] = np.concatenate([offset, rest])
    return out


def extend(joint: Joint, step: Affine, parents: slice) -> Joint:
    """The joint with ``step`` of its entries ``parents`` appended."""
    cross = joint.covariance[:, parents] @ step.matrix.T
    corner = step.matrix @ joint.covariance[parents, parents] @ step.matrix.T + step.covariance
    mean = np.concatenate([joint.mean, step.matrix @ joint.mean[parents] + step.offset])
    return Joint(mean, np.block([[joint.covariance, cross], [cross.T, corner]]))


def condition(joint: Joint, last: np.ndarray) -> Joint:
    """The joint of the entries before the last ones, given these."""
    n = len(joint.mean) - len(last)
    gain = np.linalg.solve(joint.covariance[n:, n:], joint.covariance[n:, :n]).T
    mean = joint.mean[:n] + gain @ (last - joint.mean[n:])
    return Joint(mean, joint.covariance[:n, :n] - gain @ joint.covariance[n:, :n])


def kl(q: Joint, p: Joint) -> float:
    """KL(q || p) of two Gaussians."""
    precision, shift = np.linalg.inv(p.covariance), p.mean - q.mean
    ratio = precision @ q.covariance
    return float(0.5 * (np.trace(ratio) + shift @ precision @ shift - len(shift) - np.linalg.slogdet(ratio)[1]))
