"""The slider over a connection in a notebook."""

from __future__ import annotations

import sys

import pytest

from modeconn import Connection

from ..cases import CASES, batches


def connection():
    return Connection.straight_between(*(CASES[0].make(seed) for seed in (1, 2)))


def test_the_slider_shows_what_was_measured_at_t():
    widget = connection().explore(batches(), num_points=5, quantity="accuracy")
    profile = connection().evaluate(batches(), num_points=5)
    slider, text, picture = widget.children
    for number in (0, 3, 4):
        before = bytes(picture.value)
        slider.value = number
        assert f"loss {profile.loss[number]:.4f}" in text.value
        assert f"accuracy {profile.accuracy[number]:.2%}" in text.value
        assert bytes(picture.value).startswith(b"\x89PNG") and (number == 0 or bytes(picture.value) != before)


def test_without_ipywidgets_one_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="needs ipywidgets: pip install ipywidgets"):
        connection().explore(batches(), num_points=2)


def test_a_quantity_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no quantity 'f1'"):
        connection().explore(batches(), num_points=2, quantity="f1")
