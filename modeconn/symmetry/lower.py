"""Operators that hold others, written in these: regions, and what torch decomposes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.fx import Node


def inlined(module: Any) -> Any:
    """Return the graph of a module in plain operators alone, where it holds graphs and transforms.

    The bodies of regions (no_grad, autocast) take the place of the regions, both branches of ``torch.cond`` that of the
    condition, with one ``where`` for each output; and what ``torch.vmap`` maps is written out for whole batches.
    """
    return _without_vmap(module, _without_bodies(module))


def _without_bodies(module: Any) -> Any:
    """Put the graphs that operators hold in their place."""
    bodies = {n for n in module.graph.nodes if n.op == "get_attr" and hasattr(getattr(module, n.target, None), "graph")}
    holders = {n for n in module.graph.nodes if bodies & set(n.args) and (_is_region(n) or _is_condition(n))}
    if not holders:
        return module.graph
    graph = torch.fx.Graph()
    copies: dict[Node, Any] = {}

    def body(place: Node, inputs: Sequence[Any]) -> Any:
        held = _without_bodies(getattr(module, place.target))
        places = [n for n in held.nodes if n.op == "placeholder"]
        return graph.graph_copy(held, dict(zip(places, inputs, strict=True)))

    for node in module.graph.nodes:
        if node in holders and _is_condition(node):
            condition, yes, no, operands = node.args
            inputs = [copies.get(operand, operand) for operand in operands]
            pairs = zip(body(yes, inputs), body(no, inputs), strict=True)
            copies[node] = [_either(graph, copies[condition], x, y) for x, y in pairs]
        elif node in holders:
            at = next(i for i, arg in enumerate(node.args) if arg in bodies)
            copies[node] = body(node.args[at], [copies.get(arg, arg) for arg in node.args[at + 1 :]])
        elif node.op == "call_function" and node.args and isinstance(copies.get(node.args[0]), (tuple, list)):
            copies[node] = copies[node.args[0]][node.args[1]]  # an item of what a body returns
        elif node not in bodies or not node.users.keys() <= holders:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    return graph


def _is_region(node: Node) -> bool:
    """Whether a node runs a graph under some setting."""
    return str(node.target).startswith("wrap_with_")


def _is_condition(node: Node) -> bool:
    """Whether a node is a ``torch.cond`` that ``where`` can stand for."""
    if node.target is not torch.ops.higher_order.cond or not isinstance(node.args[0], torch.fx.Node):
        return False
    condition, made = node.args[0].meta.get("val"), node.meta.get("val")
    is_number = isinstance(condition, Tensor) and not condition.dim()
    return is_number and all(isinstance(out, Tensor) for out in made)


def _either(graph: Any, condition: Node, yes: Node, no: Node) -> Node:
    chosen = graph.call_function(torch.ops.aten.where.self, (condition, yes, no))
    chosen.meta = {**yes.meta, "val": yes.meta["val"]}
    return chosen


def _without_vmap(module: Any, graph: Any) -> Any:
    """Write out what lies between the beginning and the end of a ``torch.vmap``, where operators see one example."""
    depth, regions = 0, []
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == _BEGIN:
            depth += 1
            regions += [[]] if depth == 1 else []
        if depth:
            regions[-1].append(node)
        if name == _END:
            depth -= 1
    for region in regions:
        _write_out(module, graph, region)
    return graph


_BEGIN, _END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
"""What exported graphs call where a map over examples begins and ends."""


def _write_out(module: Any, graph: Any, region: list[Node]) -> None:
    """Replace nodes by the plain operators that they make when they are run on tensors of a batch."""
    from torch.fx.experimental.proxy_tensor import make_fx

    inside = set(region)
    read = dict.fromkeys(n for node in region for n in node.all_input_nodes if n not in inside)
    held = {n: getattr(module, n.target) for n in (*read, *region) if n.op == "get_attr"}  # functions, for example
    inputs = [node for node in read if node not in held]
    outputs = [node for node in region if not node.users.keys() <= inside]

    def run(*values: Any) -> list[Any]:
        env = {**held, **dict(zip(inputs, values, strict=True))}
        for node in region:
            if node in held:
                continue
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
        return [env[node] for node in outputs]

    try:
        with levels_kept():
            written = make_fx(run)(*(node.meta["val"] for node in inputs)).graph
    except Exception:  # tracing raises errors of many types; the operators then stay, as ones without a rule
        return
    written.eliminate_dead_code()
    places = [node for node in written.nodes if node.op == "placeholder"]
    with graph.inserting_before(region[0]):
        copies = graph.graph_copy(written, dict(zip(places, inputs, strict=True)))
    where = next((node.meta["nn_module_stack"] for node in region if "nn_module_stack" in node.meta), None)
    for node in graph.nodes:
        if where is not None and "nn_module_stack" not in node.meta:
            node.meta["nn_module_stack"] = where
    for node, copy in zip(outputs, copies, strict=True):
        node.replace_all_uses_with(copy)
    for node in reversed(region):
        graph.erase_node(node)


@contextmanager
def levels_kept() -> Iterator[None]:
    """Leave no map over examples, and no derivative, open that was begun inside and not ended, since it failed."""
    transforms = torch._C._functorch
    depth = transforms.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        transforms.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def decompose(node: Node) -> Any:
    """Return the graph of simpler operators that an operator consists of, None if torch knows of none.

    Its placeholders are the tensors among the node's arguments, in their order.
    """
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    def value(leaf: Any) -> Any:
        return leaf.meta["val"] if isinstance(leaf, torch.fx.Node) else leaf

    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    leaves, structure = pytree.tree_flatten((tuple(node.args), dict(node.kwargs)))
    if any(isinstance(leaf, torch.fx.Node) and "val" not in leaf.meta for leaf in leaves):
        return None  # it reads an object that is no tensor, such as the packed weights of a quantised layer
    leaves = [value(leaf) for leaf in leaves]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return node.target(*args, **kwargs)

    tensors = [leaves[place] for place in places]
    for table in (dict, core_aten_decompositions):  # the second takes seconds to build, and is rarely needed
        try:
            graph = make_fx(call, table())(*tensors).graph
        except Exception:  # tracing an operator without a decomposition raises errors of many types
            return None
        graph.eliminate_dead_code()
        calls = [part.target for part in graph.nodes if part.op == "call_function"]
        if node.target not in calls and not any(part.op == "get_attr" for part in graph.nodes):
            return graph
    return None
