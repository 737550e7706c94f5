"""How objects show themselves in notebooks."""

from __future__ import annotations

import inspect
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import modeconn
from modeconn import Bezier, Connection, Recipe, WeightMatching, callbacks, tensor_files

PUBLIC = [getattr(where, name) for where in (modeconn, callbacks, tensor_files) for name in where.__all__]
CLASSES = [one for one in PUBLIC if inspect.isclass(one) and not issubclass(one, (Exception, Warning))]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


A, B = network(1), network(2)
DATA = [(torch.rand(16, 4, generator=torch.Generator().manual_seed(3)), torch.arange(16) % 3)]
ALIGNED = modeconn.align(A, B, DATA, example_input=DATA[0][0])
MADE = [
    Recipe(), Bezier(2), WeightMatching(), modeconn.Sinkhorn(), modeconn.PAM(), modeconn.PGD(0.1, 0.1, 1), ALIGNED,
    ALIGNED.permutation, Connection.straight_between(A, B), modeconn.DeepAlign(), modeconn.Ensemble([A, B]),
    modeconn.align(A, B, example_input=DATA[0][0], method=WeightMatching()),
    modeconn.fit_curve(A, B, DATA, align=False, recipe=Recipe(epochs=1)),
    modeconn.merge_many([A, B], example_input=DATA[0][0]), modeconn.WeightSpace(A), modeconn.Checkpoint("<a&b>"),
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_public_class_shows_itself_in_notebooks(kind):
    public = {"Entry", "Callback"}  # an entry is a line of a file; a callback is what a user writes
    assert hasattr(kind, "_repr_html_") or kind.__name__ in public or kind.__name__.endswith(("End", "Begin"))


@pytest.mark.parametrize("one", MADE, ids=lambda one: type(one).__name__)
def test_what_is_shown_is_well_formed_and_has_no_colours_of_its_own(one):
    text = one._repr_html_()
    ElementTree.fromstring(f"<div>{text}</div>")  # every mark is closed, and what is text is no mark
    assert "color" not in text and "0x" not in text and "<function" not in text


def test_a_recipe_shows_its_settings_by_name():
    text = Recipe(epochs=7)._repr_html_()
    assert '<td style="text-align: left">epochs</td><td style="text-align: left">7</td>' in text
    assert "piecewise_linear" in text


def test_a_connection_says_what_it_is():
    text = MADE[12]._repr_html_()
    assert all(word in text for word in ("Bezier", "as it was", "1 epochs", "51"))


def test_an_alignment_shows_a_row_for_each_group():
    assert ALIGNED._repr_html_().count("<tr>") == 1 + len(ALIGNED.correlation)
