"""A device of torch's that is none: its tensors hold theirs on the CPU, and meet none but scalars from there.

So what forgets to follow a program to its device fails here as it would on a GPU. It goes by the name of torch's own
``meta``, the one device that a build without others knows; the numbers are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"


class _There(torch.Tensor):
    """A tensor on the device, around one on the CPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> _There:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        self = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, device=torch.device(NAME))
        self.here = here
        return self

    def __repr__(self, **_: Any) -> str:
        return f"_There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``op`` on the CPU; its result is where its arguments are, or where it asks for."""
    tensors = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
    name, asked = op.overloadpacket.__name__, kwargs.get("device")
    _check_together(name, tensors)
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(lambda a: a.here if isinstance(a, _There) else a, (args, kwargs))
    found = op(*args, **kwargs)
    if name == "copy_":
        return tensors[0]
    known = {id(a.here): a for a in tensors if isinstance(a, _There)}
    stays = bool(known) if asked is None else torch.device(asked).type == NAME

    def placed(a: Any) -> Any:
        if not stays or not isinstance(a, torch.Tensor):
            return a
        return known[id(a)] if id(a) in known else _There(a)

    return tree_map(placed, found)


def _check_together(name: str, tensors: list[torch.Tensor]) -> None:
    """Scalars may come from the CPU; so may indices, and what is copied."""
    if not any(isinstance(a, _There) for a in tensors) or name.startswith(("copy", "_copy", "_to_copy")):
        return
    tensors = tensors[:1] if name.startswith(("index", "_index")) else tensors
    for a in tensors:
        if a.dim() > 0 and not isinstance(a, _There):
            raise RuntimeError(f"Expected all tensors to be on the same device, in {name}; got {tuple(a.shape)}")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """Those that make a tensor of numbers without an operation."""

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if fn is torch.Tensor.new_tensor:
            fn, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device} | kwargs
        if fn in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return fn(*args, **(kwargs | {"device": None})).to(kwargs["device"])
        return fn(*args, **kwargs)


@contextmanager
def a_device() -> Iterator[str]:
    """Inside there is the device; its name."""
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    with ExitStack() as stack:
        stack.enter_context(patch(fused, lambda: ["cpu", NAME]))
        stack.enter_context(_Operations())
        stack.enter_context(_Factories())
        yield NAME
