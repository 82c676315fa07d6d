"""A group of residual stochastic blocks in torch: its weights, and its latents as one distribution.

Feature maps are (N, channels, height, width) inside; latents are (…, blocks, channels, height, width).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from torch import Tensor, nn
from torch.distributions import kl_divergence, register_kl
from torch.nn.functional import conv2d, silu
from torch.utils.checkpoint import checkpoint

Weights = Mapping[str, Tensor]


# --- weights --------------------------------------------------------------------------------------------------------


class Convs(nn.Module):
    """The weights of ``count`` equal convolutions; of one, without the first axis, for None."""

    def __init__(self, count: int | None, num_inputs: int, num_outputs: int, size: int, gain: float):
        super().__init__()
        lead, bound = () if count is None else (count,), gain * sqrt(6 / ((num_inputs + num_outputs) * size**2))
        self.weight = nn.Parameter(torch.empty(*lead, num_outputs, num_inputs, size, size).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(*lead, num_outputs))


class Residuals(nn.Module):
    """The weights of ``count`` equal networks of three convolutions; ``gain`` is the last one's."""

    def __init__(self, count: int, num_inputs: int, hidden: int, num_outputs: int, gain: float):
        super().__init__()
        sizes = ((num_inputs, hidden, 1, 1.0), (hidden, hidden, 3, 1.0), (hidden, num_outputs, 1, gain))
        self.layers = nn.ModuleList([Convs(count, *each) for each in sizes])


def as_it_is(parameter: Tensor) -> Tensor:
    """A parameter that what is worked out later, and anew in a backward pass, sees as it is now: constant or not."""
    return parameter.view_as(parameter) if parameter.requires_grad else parameter.detach()


def unstack(module: nn.Module) -> list[Weights]:
    """Each block's weights, by name."""
    views = {name: as_it_is(parameter).unbind(0) for name, parameter in module.named_parameters()}
    count = len(next(iter(views.values())))
    return [{name: each[i] for name, each in views.items()} for i in range(count)]


def convolve(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One convolution that keeps the height and width."""
    kernel = weights[name + "weight"]
    return conv2d(x, kernel, weights[name + "bias"], padding=kernel.shape[-1] // 2)


def residual(weights: Weights, name: str, x: Tensor) -> Tensor:
    """One network of three convolutions, a silu before each."""
    for layer in range(3):
        x = convolve(weights, f"{name}layers.{layer}.", silu(x))
    return x


# --- the distribution -----------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """The blocks' latents, the locations and log scales they have given those above, and the state below the last."""

    value: Tensor
    loc: Tensor
    log_scale: Tensor
    state: Tensor


class Memory:
    """What a distribution, and its expanded copies, last drew and worked out."""

    def __init__(self) -> None:
        self.drawn: Tensor | None = None
        self.path: Path | None = None
        self.differentiable = False

    def keep(self, path: Path) -> Path:
        self.path, self.differentiable = path, torch.is_grad_enabled()
        return path

    def of(self, value: Tensor) -> Path | None:
        """The path of ``value``, if it is at hand."""
        known = self.path is not None and self.path.value is value and self.differentiable == torch.is_grad_enabled()
        return self.path if known else None


class Layers(TorchDistribution):
    r"""The latents of a group of blocks, each given those before it; the spec has the mathematics.

    Batch shape (…, blocks): ``log_prob`` has a term a block. ``to_event(1)`` makes it a joint distribution.

    Args:
        blocks: weights of the generative blocks, one by one.
        state: of the path above, (…, width, height, width).
        posterior, features: of a guide: its networks' weights, one by one, and the encoder's features of x.
        remat: compute the blocks anew in the backward pass.
    """

    arg_constraints: ClassVar = {}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(
        self,
        blocks: Sequence[Weights],
        state: Tensor,
        posterior: Sequence[Weights] | None = None,
        features: Tensor | None = None,
        remat: bool = False,
        *,
        validate_args: bool | None = None,
    ):
        self.blocks, self.start, self.posterior, self.features, self.remat = blocks, state, posterior, features, remat
        self.memory = Memory()
        channels = blocks[0]["project.weight"].shape[1]
        lead = torch.broadcast_shapes(*(a.shape[:-3] for a in (state, features) if a is not None))
        event_shape = torch.Size((channels, *state.shape[-2:]))
        super().__init__(torch.Size((*lead, len(blocks))), event_shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(Layers, _instance)
        batch_shape = torch.Size(batch_shape)
        new.blocks, new.start, new.posterior, new.features, new.remat, new.memory = (
            self.blocks, self.start, self.posterior, self.features, self.remat, self.memory
        )  # fmt: skip
        super(Layers, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _run(self, latents: Tensor, draw: bool) -> Path:
        """Down the path with these latents (…, blocks, *event), or with latents made of such noise."""
        lead = latents.shape[:-4]

        def spread(x: Tensor) -> Tensor:
            return x.expand(*lead, *x.shape[-3:]).reshape(prod(lead), *x.shape[-3:])

        features = None if self.features is None else spread(self.features)

        def block(state: Tensor, latent: Tensor, generative: Weights, posterior: Weights | None) -> tuple:
            width, channels = state.shape[1], latent.shape[1]
            shift, loc, log_scale = residual(generative, "prior.", state).split([width, channels, channels], 1)
            if features is not None and posterior is not None:
                moved = residual(posterior, "", torch.cat([state, features], 1))
                loc, log_scale = loc + moved[:, :channels], log_scale + moved[:, channels:]
            if draw:
                latent = loc + log_scale.exp() * latent
            state = state + shift + convolve(generative, "project.", latent)
            return state + residual(generative, "residual.", state), latent, loc, log_scale

        state, each = spread(self.start), []
        flat = latents.reshape(prod(lead), *latents.shape[-4:]).unbind(1)
        for latent, *weights in zip(flat, self.blocks, self.posterior or [None] * len(flat), strict=True):
            if self.remat and torch.is_grad_enabled():
                state, *rest = checkpoint(block, state, latent, *weights, use_reentrant=False, preserve_rng_state=False)
            else:
                state, *rest = block(state, latent, *weights)
            each.append(rest)
        value, loc, log_scale = (torch.stack(x, 1).reshape(latents.shape) for x in zip(*each, strict=True))
        return Path(value, loc, log_scale, state.reshape(*lead, *state.shape[1:]))

    def path(self, value: Tensor) -> Path:
        """Down the path with the latents ``value``; what was last drawn or asked for is at hand."""
        return self.memory.of(value) or self.memory.keep(self._run(value, draw=False)._replace(value=value))

    def state(self, value: Tensor) -> Tensor:
        """The state below the last block, (…, width, height, width)."""
        return self.path(value).state

    def rsample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.start.dtype, device=self.start.device)
        path = self.memory.keep(self._run(noise, draw=True))
        self.memory.drawn = path.value
        return path.value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        path = self.path(value)
        return Normal(path.loc, path.log_scale.exp()).log_prob(value).sum((-3, -2, -1))


@register_kl(Layers, Layers)
def kl_of_layers(q: Layers, p: Layers) -> Tensor:
    """The KL of each block given the blocks above as ``q`` drew them, (…, blocks).

    Raises: NotImplementedError unless ``p`` was last asked for its path at what ``q`` drew.
    """
    drawn, given = q.memory.drawn, p.memory.path
    if drawn is None or given is None or not _one(drawn, given.value):
        raise NotImplementedError
    one, two = q.path(drawn), p.path(given.value)
    ends = (Normal(path.loc, path.log_scale.exp()) for path in (one, two))
    return kl_divergence(*ends).sum((-3, -2, -1))


def _one(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one piece of memory, or one view of the other."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())
