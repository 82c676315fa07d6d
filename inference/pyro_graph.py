"""A step of torch as a straight line of tensor operations, without those that it can do without.

Every operation of a small network costs more time to start than to run, and autograd writes down many that change
nothing. What is taken out here changes no number, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from elbozoo.inference.errors import ElbozooError

aten = torch.ops.aten
ALIASES = {aten.detach.default, aten.alias.default}
RESHAPES = {aten.view.default, aten.expand.default, aten._unsafe_view.default, aten.reshape.default}
TWICE = {aten.t.default, aten.neg.default}
"""Operations that undo themselves."""
UNITS = {
    aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.div.Tensor: 1, aten.div.Scalar: 1, aten.pow.Tensor_Scalar: 1,
    aten.sub.Tensor: 0,
}  # fmt: skip
"""Operations and the second argument with which they give back the first; ``add`` of 0 makes 0.0 of -0.0."""
LIKE: dict[Any, Callable[..., torch.Tensor]] = {
    aten.ones_like.default: torch.ones,
    aten.zeros_like.default: torch.zeros,
}
"""Operations that look at their argument's shape alone."""
LARGEST = 2**20
"""Entries of a constant up to which it is worth its memory."""


def traced(step: Callable, *args: Any) -> Callable | None:
    """``step`` as a straight line of tensor operations on ``args`` alone; None where it cannot be traced.

    Draws that a replayed guide throws away are taken out, so that random numbers are used up as without a trace.
    """
    try:
        module = make_fx(step)(*args)
    except ElbozooError:
        raise
    except Exception:  # whatever is wrong with the program shows again when it is run as it is
        return None
    module.graph.eliminate_dead_code()
    _forget_unused_draws(module.graph)
    if not any(map(_changes_what_others_see, module.graph.nodes)):
        _simplify(module)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _simplify(module: GraphModule) -> None:
    """Take out operations that change nothing, that were done before, or that are of constants alone.

    Nothing in the graph may write into a tensor that is read elsewhere.
    """
    seen: dict[Any, Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        same = None if _handed_out(node) else _same(node)  # a result is no view of a parameter, if it was none
        if same is None and _is_function(node):
            key = (node.target, _hashable(node.args), _hashable(node.kwargs))
            same = seen.setdefault(key, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
    _fold(module)


def _same(node: Node) -> Node | None:
    """The argument that an operation gives back as it is; None where it does not."""
    first, *others = node.args or (None,)
    if not isinstance(first, Node):
        return None
    if node.target in TWICE and first.target is node.target:
        return first.args[0]  # type: ignore[return-value]
    value, was = node.meta.get("val"), first.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(was, torch.Tensor) or value.dtype != was.dtype:
        return None
    unchanged = value.shape == was.shape and value.stride() == was.stride()  # sums go by strides, in their last bits
    if node.target in ALIASES or (node.target in RESHAPES and unchanged):
        return first
    unit = UNITS.get(node.target)  # type: ignore[arg-type]
    if unit is None or not unchanged or node.kwargs or len(others) != 1:
        return None
    (other,) = others
    is_unit = isinstance(other, int | float) and repr(float(other)) == repr(float(unit))  # -0.0 is not 0.0
    return first if is_unit else None


def _handed_out(node: Node) -> bool:
    """Whether it, or a view of it, is a result of the step."""
    return any(user.op == "output" or (_is_view(user) and _handed_out(user)) for user in node.users)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is getitem or (schema is not None and any(result.alias_info for result in schema.returns))


def _is_function(node: Node) -> bool:
    """Whether equal arguments give equal values; of ``empty`` nobody knows the values."""
    tags: Any = getattr(node.target, "tags", ())
    made = "empty" in node.target._schema.name  # type: ignore[union-attr]
    return not (node.target._schema.is_mutable or made or torch.Tag.nondeterministic_seeded in tags)  # type: ignore[union-attr]


def _changes_what_others_see(node: Node) -> bool:
    """Whether a node writes into a tensor that it was not the first to get: a buffer, say."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    into = node.args[0]
    return not (isinstance(into, Node) and "empty" in str(into.target) and set(into.users) == {node})


def _fold(module: GraphModule) -> None:
    """Compute once what depends on numbers that are written in the program alone."""
    known: dict[Node, torch.Tensor] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not _is_function(node):
            continue
        if node.target is aten.lift_fresh_copy.default:  # of a number; nobody else has the copy
            known[node] = getattr(module, node.args[0].target).clone()  # type: ignore[union-attr]
        elif node.target in LIKE and isinstance(value := node.meta.get("val"), torch.Tensor):
            if value.numel() <= LARGEST and value.is_contiguous():
                known[node] = LIKE[node.target](value.shape, dtype=value.dtype, device=value.device)
        elif node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            value = node.target(*args, **kwargs)
            if isinstance(value, torch.Tensor) and value.numel() <= LARGEST:
                known[node] = value
    for i, (node, value) in enumerate(known.items()):
        if any(user not in known for user in node.users) and not _handed_out(node):
            module.register_buffer(name := f"_folded{i}", value)
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)


def _forget_unused_draws(graph: Graph) -> None:
    for node in reversed(graph.nodes):
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not node.users:
            fills = node.target._schema.is_mutable  # type: ignore[union-attr]  # a new tensor in place; else it makes one
            if not fills or set(node.args[0].users) == {node}:  # type: ignore[union-attr]
                graph.erase_node(node)
    graph.eliminate_dead_code()


def _hashable(argument: Any) -> Any:
    """An argument of a node as a key: 1 and 1.0 are two, and so are 0.0 and -0.0."""
    if isinstance(argument, dict):
        return tuple((k, _hashable(v)) for k, v in argument.items())
    if isinstance(argument, list | tuple):
        return tuple(_hashable(a) for a in argument)
    return type(argument), repr(argument) if isinstance(argument, float) else argument
