"""The quantizers in Pyro, and distributions over their codes."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log
from typing import ClassVar, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from elbozoo.zoo import quantizers as specs


class Quantization(NamedTuple):
    """What a quantizer makes of outputs (..., P, D)."""

    residuals: Tensor  # what each codebook was given, (..., P, depth, D), constant
    index: Tensor  # (..., P, depth)
    posterior: TorchDistribution  # q(z | x), a point mass, event shape (P depth, D)


def quantize(encoded: Tensor, codes: Tensor, trained: bool = True) -> Quantization:
    """Outputs (..., P, D) by the codes (depth, K, D) that are nearest to them, to what is left, and so on."""
    residual, residuals, indices, chosen, errors, commitments = encoded, [], [], [], [], []
    for book in codes:
        index = nearest(residual.detach()[..., None, :], book.detach()[None])[..., 0]
        code = book[index]
        residuals.append(residual.detach())
        indices.append(index)
        chosen.append(code.detach())
        errors.append(((residual.detach() - code) ** 2).sum(-1))
        commitments.append(((residual - code.detach()) ** 2).sum(-1))
        residual = residual - code.detach()
    chosen[0] = chosen[0] + (encoded - encoded.detach())  # exactly the code; its derivative is the output's

    def flat(parts: list[Tensor], event_ndim: int) -> Tensor:
        """The parts of each position next to one another."""
        stacked = torch.stack(parts, -1 - event_ndim)
        return stacked.flatten(-2 - event_ndim, -1 - event_ndim)

    scale = 1.0 if trained else 0.0
    posterior = NearestCode(flat(chosen, 1), scale * flat(errors, 0), scale * flat(commitments, 0)).to_event(1)
    return Quantization(torch.stack(residuals, -2), torch.stack(indices, -1), posterior)


def nearest(x: Tensor, codes: Tensor) -> Tensor:
    """Indices (..., depth) of the codes (depth, K, D) nearest to x (..., depth, D)."""
    distance = (codes**2).sum(-1) - 2 * torch.einsum("...de,dke->...dk", x, codes)
    return distance.argmin(-1)


def same(value: Tensor, code: Tensor) -> Tensor:
    """Whether a value (..., D) is a code, up to how far rounding lets a search be wrong."""
    return ((value - code) ** 2).sum(-1) <= 1e-5 * (value**2).sum(-1) + 1e-12


# --- forms --------------------------------------------------------------------------------------------------------


class Codebook(nn.Module):
    """The codes, parameters or buffers."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    steps: Tensor

    def __init__(self, spec: specs.Codebook):
        super().__init__()
        self.spec, bound = spec, 1.0 / spec.num_codes
        codes = torch.empty(spec.depth, spec.num_codes, spec.code_dim).uniform_(-bound, bound)
        if spec.update == "gradient":
            self.codes = nn.Parameter(codes)
            return
        start = {"codes": codes, "counts": torch.ones(codes.shape[:2]), "sums": codes.clone()}
        for name, value in {**start, "steps": torch.zeros((), dtype=torch.int32)}.items():
            self.register_buffer(name, value)
            self.register_buffer(f"next_{name}", value.clone(), persistent=False)

    def read(self) -> Tensor:
        """(depth, num_codes, code_dim), which no later :meth:`commit` changes."""
        return self.codes.clone() if self._follows() else self.codes

    def encode(self, outputs: Tensor) -> TorchDistribution:
        """q(z | x) of outputs (..., P, D); moving averages are worked out for :meth:`commit`."""
        found = quantize(outputs, self.codes)
        if self._follows():
            with torch.no_grad():
                for name, value in follow(self.spec, self, found).items():
                    getattr(self, f"next_{name}").copy_(value)
        return found.posterior

    def commit(self) -> None:
        """Let the codes follow what the guide has seen. The model does so last, for both have read them by then."""
        if self._follows():
            with torch.no_grad():
                for name in ("codes", "counts", "sums", "steps"):
                    getattr(self, name).copy_(getattr(self, f"next_{name}"))

    def _follows(self) -> bool:
        """In training alone, which is where there are gradients too."""
        return self.spec.update == "ema" and self.training and torch.is_grad_enabled()


class Residual(Codebook):
    """Several codebooks."""


class FiniteScalar(nn.Module):
    codes: Tensor
    bounds: Tensor

    def __init__(self, spec: specs.FiniteScalar):
        super().__init__()
        dtype = torch.get_default_dtype()
        self.register_buffer("codes", torch.as_tensor(spec.table({}), dtype=dtype), persistent=False)
        self.register_buffer("bounds", torch.as_tensor(spec.bounds(), dtype=dtype), persistent=False)

    def read(self) -> Tensor:
        return self.codes

    def encode(self, outputs: Tensor) -> TorchDistribution:
        half, shift, offset, width = self.bounds
        bounded = ((outputs + shift).tanh() * half - offset) / width
        return quantize(bounded, self.codes, trained=False).posterior

    def commit(self) -> None:
        pass


def follow(spec: specs.Codebook, state: Codebook, found: Quantization) -> dict[str, Tensor]:
    """The moving averages after a step, dead codes revived."""
    residuals = found.residuals.reshape(-1, *found.residuals.shape[-2:])
    index, steps = found.index.reshape(-1, found.index.shape[-1]), state.steps + 1
    next_state = [
        _follow(spec, state.codes[d], state.counts[d], state.sums[d], residuals[:, d], index[:, d], steps)
        for d in range(spec.depth)
    ]
    codes, counts, sums = (torch.stack(each) for each in zip(*next_state, strict=True))
    return {"codes": codes, "counts": counts, "sums": sums, "steps": steps}


def _follow(
    spec: specs.Codebook, codes: Tensor, counts: Tensor, sums: Tensor, outputs: Tensor, index: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One codebook (K, D) after the outputs (n, D) at the codes ``index`` (n,)."""
    hits = torch.zeros_like(counts).index_add(0, index, torch.ones_like(outputs[:, 0]))
    counts = spec.decay * counts + (1 - spec.decay) * hits
    sums = spec.decay * sums + (1 - spec.decay) * torch.zeros_like(sums).index_add(0, index, outputs)
    used = hits > 0
    codes = torch.where(used[:, None], sums / torch.where(used, counts, torch.ones_like(counts))[:, None], codes)
    if not spec.revive:
        return codes, counts, sums
    num, dead = len(outputs), counts < spec.revive
    rank = dead.cumsum(0) - 1
    stride = (num // dead.sum().clamp(min=1)).clamp(min=1)
    revived = (dead & (rank < num))[:, None]
    fresh = outputs[(rank * stride + steps % num * specs.WALK) % num]
    return (
        torch.where(revived, fresh, codes),
        torch.where(revived[:, 0], torch.ones_like(counts), counts),
        torch.where(revived, fresh, sums),
    )


# --- distributions over codes -------------------------------------------------------------------------------------


class _Codes(constraints.Constraint):
    """Vectors from a finite set."""

    is_discrete = True
    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        return value.isfinite().all(-1)


class NearestCode(TorchDistribution):
    """Point masses at codes (..., D), whose draws carry a derivative of their own; with the errors of quantisation."""

    arg_constraints: ClassVar = {}
    has_rsample = True
    support = _Codes()

    def __init__(
        self, code: Tensor, codebook_error: Tensor, commitment_error: Tensor, *, validate_args: bool | None = None
    ):
        self.code, self.codebook_error, self.commitment_error = code, codebook_error, commitment_error
        super().__init__(code.shape[:-1], code.shape[-1:], validate_args=validate_args)

    @property
    def quantisation_errors(self) -> tuple[tuple[str, Tensor], ...]:
        """``||sg(e) - c||^2`` and ``||e - sg(c)||^2``, of batch shape."""
        return ("codebook_error", self.codebook_error), ("commitment_error", self.commitment_error)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(NearestCode, _instance)
        batch_shape = torch.Size(batch_shape)
        new.code = self.code.expand(batch_shape + self.event_shape)
        new.codebook_error = self.codebook_error.expand(batch_shape)
        new.commitment_error = self.commitment_error.expand(batch_shape)
        super(NearestCode, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        return self.code.expand(self._extended_shape(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = same(value, self.code.detach())
        return torch.zeros_like(self.codebook_error).masked_fill(~inside, -inf)


class UniformCodes(TorchDistribution):
    """A code of each of P depth codebooks with equal probabilities; batch shape (P depth,), event shape (D,)."""

    arg_constraints: ClassVar = {}
    support = _Codes()

    def __init__(self, codes: Tensor, positions: int, *, validate_args: bool | None = None):
        self.codes = codes.detach()
        super().__init__(torch.Size([positions * len(codes)]), codes.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(UniformCodes, _instance)
        new.codes = self.codes
        super(UniformCodes, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            shape = torch.Size(sample_shape) + self.batch_shape
            index = torch.randint(self.codes.shape[1], shape, device=self.codes.device)
            return look_up(self.codes, index.reshape(*shape[:-1], -1, len(self.codes)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        _, inside = find(self.codes, value)
        each = value.new_full(inside.shape, -log(self.codes.shape[1]))
        return each.masked_fill(~inside, -inf)


class AutoregressiveCodes(TorchDistribution):
    """A code of each codebook given the indices before it; batch shape () or the context's, event shape (P depth, D).

    ``logits`` maps indices (..., P depth) to the logits of each (..., P depth, K), which depend on those before it, and
    on the indices (*batch, n) of the context where there is one.
    """

    arg_constraints: ClassVar = {}
    support = constraints.independent(_Codes(), 1)

    def __init__(
        self,
        codes: Tensor,
        positions: int,
        logits: Callable,
        context: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.codes, self.logits, self.context = codes.detach(), logits, context
        event_shape = torch.Size([positions * len(codes), codes.shape[-1]])
        batch_shape = torch.Size() if context is None else context.shape[:-1]
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(AutoregressiveCodes, _instance)
        new.codes, new.logits, new.context = self.codes, self.logits, self.context
        if self.context is not None:
            new.context = self.context.expand(*batch_shape, self.context.shape[-1])
        super(AutoregressiveCodes, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _conditionals(self, index: Tensor) -> Tensor:
        return self.logits(index) if self.context is None else self.logits(index, self.context)

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            shape, length = torch.Size(sample_shape) + self.batch_shape, self.event_shape[0]
            index = torch.zeros((*shape, length), dtype=torch.long, device=self.codes.device)
            for i in range(length):
                index[..., i] = torch.distributions.Categorical(logits=self._conditionals(index)[..., i, :]).sample()
            return look_up(self.codes, index.reshape(*shape, -1, len(self.codes)))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        index, inside = find(self.codes, value)
        each = self._conditionals(index).log_softmax(-1)
        chosen = each.gather(-1, index[..., None])[..., 0]
        return chosen.sum(-1).masked_fill(~inside.all(-1), -inf)


def indices(codes: Tensor, value: Tensor) -> Tensor:
    """Indices (..., P depth) of the codes (depth, K, D) that values (..., P depth, D) stand for."""
    return find(codes.detach(), value)[0]


def look_up(codes: Tensor, index: Tensor) -> Tensor:
    """The codes (depth, K, D) at indices (..., P, depth), (..., P depth, D)."""
    return codes[torch.arange(len(codes), device=codes.device), index].flatten(-3, -2)


def find(codes: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of values (..., P depth, D) and whether each is a code, (..., P depth)."""
    value = value.detach()
    split = value.reshape(*value.shape[:-2], -1, len(codes), value.shape[-1])
    index = nearest(split, codes)
    return index.reshape(value.shape[:-1]), same(value, look_up(codes, index))
