"""Recurrent networks and their cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modeconn.symmetry.axes import Axis
from modeconn.symmetry.rules.elementwise import broadcast
from modeconn.symmetry.rules.operators import aten, table
from modeconn.symmetry.walk import Traced, Walk


def _cell(walk: Walk, x: Axis, weights: Sequence[Traced], hidden: Axis, projection: Axis | None = None) -> None:
    """One layer and direction: gates x hidden units, the same units in every gate and in the state."""
    size = walk.size(hidden)
    state = hidden if projection is None else projection
    matrices, biases = [w for w in weights if len(w.axes) == 2], [w for w in weights if len(w.axes) == 1]
    if projection is not None:
        walk.unify(matrices[2].axes[0], projection)
        walk.unify(matrices[2].axes[1], hidden)
        walk.contract(Traced((hidden,)), hidden)
    for matrix, source in zip(matrices[:2], (x, state), strict=True):
        walk.unify(matrix.axes[1], source)
        walk.contract(Traced((source,)), source)
    for weight in (*matrices[:2], *biases):
        gates, units = walk.split(weight.axes[0], (walk.size(weight.axes[0]) // size, size))
        walk.fix(gates, "gates within a recurrent unit")
        walk.unify(units, hidden)
    walk.show([hidden])


def recurrent_cell(walk: Walk, input: Traced, hx: Any, *weights: Traced | None) -> Any:
    """``lstm_cell``, ``gru_cell``, ``rnn_*_cell``."""
    states = [hx] if isinstance(hx, Traced) else list(hx)
    hidden = states[0].axes[-1]
    for state in states:
        walk.unify(state.axes[-1], hidden)
    walk.contract(states[0], hidden)
    walk.contract(input, input.axes[-1])
    _cell(walk, input.axes[-1], [w for w in weights if w is not None], hidden)
    batch = broadcast(walk, [Traced(tuple(t.axes[:-1])) for t in (input, *states)], len(states[0].axes) - 1)
    walk.show(batch)
    out = [*batch, hidden]
    return [out] * len(walk.shapes) if len(walk.shapes) > 1 else out


def recurrent(
    walk: Walk,
    input: Traced,
    hx: Any,
    params: Sequence[Traced],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> list[list[Axis]]:
    """``lstm``, ``gru``, ``rnn_*`` over a sequence; states are stacks over layers and directions."""
    states = [hx] if isinstance(hx, Traced) else list(hx)
    walk.fix(input.axes[1 if batch_first else 0], "order in time")
    batch = [input.axes[0 if batch_first else 1]] if len(input.axes) == 3 else []
    x, stacks = _layers(walk, input, states, batch, params, num_layers, 2 if bidirectional else 1)
    return [[*input.axes[:-1], x], *stacks[: len(walk.shapes) - 1]]


def packed_recurrent(
    walk: Walk,
    data: Traced,
    batch_sizes: Traced,
    hx: Any,
    params: Sequence[Traced],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> list[list[Axis]]:
    """``lstm``, ``gru``, ``rnn_*`` over packed sequences: rows in order of time, as many at each as are not over."""
    states = [hx] if isinstance(hx, Traced) else list(hx)
    for axis in (data.axes[0], batch_sizes.axes[0], *(s.axes[1] for s in states)):
        walk.fix(axis, "order in time")
    x, stacks = _layers(walk, data, states, [states[0].axes[1]], params, num_layers, 2 if bidirectional else 1)
    return [[walk.fixed(walk.shape[0], "order in time"), x], *stacks[: len(walk.shapes) - 1]]


def _layers(
    walk: Walk,
    input: Traced,
    states: Sequence[Traced],
    batch: Sequence[Axis],
    params: Sequence[Traced],
    num_layers: int,
    directions: int,
) -> tuple[Axis, list[list[Axis]]]:
    """Return the units of the last layer, and the axes of the final states."""
    per_cell = len(params) // (num_layers * directions)
    x, finals, cells = input.axes[-1], [], []
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            k = layer * directions + direction
            weights = params[k * per_cell : (k + 1) * per_cell]
            projected = sum(len(w.axes) == 2 for w in weights) == 3
            state = walk.free(walk.size(weights[1].axes[1]))
            hidden = walk.free(walk.size(weights[-1].axes[1])) if projected else state
            _cell(walk, x, weights, hidden, state if projected else None)
            for s, axis in zip(states, (state, hidden), strict=False):
                walk.unify(walk.member(s.axes[-1], s.axes[0], k), axis)
            outs.append(state)
            finals.append(state)
            cells.append(hidden)
        x = walk.concatenate(outs)
    walk.contract(input, input.axes[-1])
    over = walk.fixed(num_layers * directions, "layers")
    for s in states:
        for axis, entries in zip(batch, s.axes[1:], strict=False):
            walk.unify(axis, entries)
    walk.show(batch)
    return x, [[over, *batch, walk.family(over, axes)] for axes in (finals, cells)]


def pack(walk: Walk, input: Traced, lengths: Traced, batch_first: bool) -> list[list[Axis]]:
    """Sequences of several lengths as one row for each of their entries, in order of time."""
    for axis in (*input.axes[:2], *lengths.axes):
        walk.fix(axis, "order in time")
    walk.show(input.axes[2:])
    rows, sizes = walk.shapes
    return [[walk.fixed(rows[0], "order in time"), *input.axes[2:]], [walk.fixed(sizes[0], "order in time")]]


def unpack(
    walk: Walk, data: Traced, batch_sizes: Traced, batch_first: bool, padding_value: float, total_length: int
) -> list[list[Axis]]:
    """Rows of packed sequences back to one sequence for each example, and their lengths."""
    for axis in (data.axes[0], *batch_sizes.axes):
        walk.fix(axis, "order in time")
    walk.show(data.axes[1:])
    padded, lengths = walk.shapes
    return [
        [*(walk.fixed(n, "order in time") for n in padded[:2]), *data.axes[1:]],
        [walk.fixed(lengths[0], "order in time")],
    ]


RULES = table(
    {
        recurrent_cell: "lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell",
        pack: "_pack_padded_sequence",
        unpack: "_pad_packed_sequence",
    }
)
for _packet in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu):
    RULES[_packet.input] = recurrent
    RULES[_packet.data] = packed_recurrent
