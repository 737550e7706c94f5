"""The page about runs: what stands in it, what is left out and named, what is refused."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import modeconn
from modeconn import Profile, data, models
from modeconn.cli.app import app
from modeconn.cli.files import DEMO
from modeconn.tools.json_files import KIND, to_json

T = torch.linspace(0, 1, 5, dtype=torch.float64)


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.exit_code, result.output, result.exception)
    return result


def profile(height):
    return Profile(T, loss=1 + height * T * (1 - T), accuracy=0.9 - T / 10, arc_length=T, num_examples=50)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs: one with a connection and all that was measured of it, one with a profile and a damaged file."""
    first, second = (tmp_path_factory.mktemp(name) for name in ("first", "second"))
    train, test = data.load("digits")
    a, b = (models.train(models.mlp(64, (8,), 10, seed=s), train, recipe=modeconn.Recipe(1)) for s in (1, 2))
    connection = modeconn.fit_curve(a, b, train, recipe=modeconn.Recipe(1))
    connection.save(first / "curve.safetensors")
    connection.evaluate(test, num_points=3).to_json(first / "curve.json")
    attack = modeconn.PGD(0.1, 0.05, 1)
    connection.robustness(test, attack, num_points=2, num_examples=20).to_json(first / "curve.robust.json")
    modeconn.plane(connection, test, num_points=3).save(first / "curve.plane.json")
    (first / "note.csv").write_text("said again elsewhere")
    profile(4).to_json(second / "a <b> & c.json")
    (second / "damaged.json").write_text("{")
    return first, second


class Page(HTMLParser):
    """Whether every mark that is opened is closed, what is loaded, and the text."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.loaded, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "br"):
            self.opened.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, text):
        self.texts.append(text)


def test_a_page_holds_all_of_several_runs(runs, tmp_path):
    out = tmp_path / "page.html"
    with pytest.warns(UserWarning, match=r"left out of the report: .*damaged\.json"):
        run("report", *runs, "--out", out)
    text = out.read_text()
    page = Page(text)
    assert not page.opened and all(source.startswith("data:image/svg+xml;base64,") for source in page.loaded)
    assert len(page.loaded) == 7  # history, map of it and cycles of the connection, three results, and a profile
    for source in page.loaded:
        assert b"<svg" in base64.b64decode(source.partition(",")[2])
    shown = " ".join(page.texts)
    for word in ("curve.json", "robust profile", "plane", "damaged.json: cannot be read", "a <b> & c.json", "PGD"):
        assert word in shown, word
    assert "note.csv" not in shown and len(text) < 5_000_000
    library = re.search('id="library">([^<]*)<', text)[1]
    assert b"plotly.js" in gzip.decompress(base64.b64decode(library))[:500]
    assert "http://" not in text.replace(library, "") and "https://" not in text.replace(library, "")


def test_the_figure_switches_between_quantities_and_slides_over_t(runs, tmp_path):
    out = tmp_path / "page.html"
    run("report", runs[0], runs[1] / "a <b> & c.json", "--out", out)
    content = re.search('<script type="application/json">(.*?)</script>', out.read_text(), re.DOTALL)[1]
    drawn = json.loads(content)
    (menu,) = drawn["layout"]["updatemenus"]
    for button in menu["buttons"]:
        (shown, axis) = button["args"]
        visible = [trace for trace, is_shown in zip(drawn["data"], shown["visible"], strict=True) if is_shown]
        assert visible and button["label"] in axis["yaxis.title.text"]
        for trace in visible:
            assert "<extra>" in trace["hovertemplate"] and len(trace["x"]) == len(trace["y"])
    loss, accuracy = (next(b for b in menu["buttons"] if b["label"] == name) for name in ("loss", "accuracy"))
    ours = [trace for trace, on in zip(drawn["data"], loss["args"][0]["visible"], strict=True) if on][-1]
    assert ours["y"] == profile(4).loss.tolist() and ours["name"] == "a <b> & c"
    ours = [trace for trace, on in zip(drawn["data"], accuracy["args"][0]["visible"], strict=True) if on][-1]
    assert ours["y"] == pytest.approx((100 * profile(4).accuracy).tolist())
    (slider,) = drawn["layout"]["sliders"]
    places = [step["args"][0]["shapes"][0]["x0"] for step in slider["steps"]]
    assert places[0] == 0 and places[-1] == 1 and places == sorted(places)


def test_files_stand_in_the_order_in_which_a_demo_lists_them_and_one_relabelling_is_drawn_once(runs, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(runs[0] / "curve.safetensors", tmp_path / "run" / "a curve.safetensors")
    modeconn.Connection.load(runs[0] / "curve.safetensors").permutation.save(tmp_path / "run" / "moved.safetensors")
    for number, name in enumerate(("z", "m", "a curve")):
        profile(number).to_json(tmp_path / "run" / f"{name}.json")
    row = {"loss t=0": 0.25, "acc t=0": 0.5}
    to_json({KIND: DEMO, "table": {"z": row}, "files": dict(enumerate(("z", "m", "a curve")))}, tmp_path / "run/n.json")
    run("report", tmp_path / "run", "--out", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    names = ["n.json", "z.json", "m.json", "a curve.json", "a curve.safetensors", "moved.safetensors"]
    assert re.findall("<summary><b>(.*?)</b>", text) == names
    assert "50.0%" in text and text.count('cycles" src="') == 1
    assert "<p>Its relabelling is the one drawn at a curve.safetensors.</p>" in text


def test_without_curves_a_page_needs_no_library(runs, tmp_path):
    run("report", runs[0] / "curve.plane.json", "--out", tmp_path / "page.html", "--title", "One <plane>")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and "<h1>One &lt;plane&gt;</h1>" in text


@pytest.mark.filterwarnings("ignore:left out of the report")
def test_what_cannot_be_reported_is_one_sentence_and_writes_nothing(runs, tmp_path):
    result = run("report", runs[1] / "damaged.json", "--out", tmp_path / "page.html", code=1)
    assert "there is nothing of modeconn to report in" in " ".join(result.stderr.split())
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "nothing of modeconn" in run("report", empty, "--out", tmp_path / "page.html", code=1).stderr
    assert not (tmp_path / "page.html").exists()
    (tmp_path / "page.html").write_text("mine")
    result = run("report", runs[0], "--out", tmp_path / "page.html", code=1)
    assert "--overwrite" in result.stderr and (tmp_path / "page.html").read_text() == "mine"
