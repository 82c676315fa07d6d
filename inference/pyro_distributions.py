"""A distribution of Pyro's that a training step can be traced through."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["OneHotCategorical"]


class OneHotCategorical(dist.OneHotCategorical):
    """Pyro's own: the same draws, made without looking at a value, which a traced step of training cannot do."""

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            index = self._categorical.sample(torch.Size(sample_shape))[..., None]
            return self.logits.new_zeros((*index.shape[:-1], *self.event_shape)).scatter(-1, index, 1.0)
