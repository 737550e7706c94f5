from __future__ import annotations

import subprocess
import sys

from modeconn import Recipe, Sinkhorn, StraightThrough, align, discover, fit_curve, models, tools
from modeconn.connection import Connection
from tests.cases import CASE, batches


def test_bars_are_shown_where_they_are_asked_for_and_nowhere_else(capsys):
    a, b = CASE["mlp"].make(0), CASE["mlp"].make(1)
    for progress in (False, True):
        models.train(a, batches(), recipe=Recipe(2), progress=progress)
        fit_curve(a, b, batches(), align=False, recipe=Recipe(2), progress=progress)
        Connection.straight_between(a, b).evaluate(batches(), num_points=3, progress=progress)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert [word in shown.err for word in ("train", "2/2", "evaluate", "3/3")] == 4 * [progress]


def test_learned_matching_discovery_and_proof_show_bars_where_they_take_long(capsys, monkeypatch):
    monkeypatch.setattr(tools.progress, "_DELAY", 0.0)
    a, b = CASE["mlp"].make(0), CASE["mlp"].make(1)
    for progress in (False, True):
        for method in (Sinkhorn(num_steps=3), StraightThrough(num_steps=3)):
            fit_curve(a, b, batches(), align=method, recipe=Recipe(1), progress=progress)
        align(a, b, batches(), progress=progress)
        shown = capsys.readouterr().err
        words = ["soft matching", "straight-through", "discover, eval", "discover, train", "verify, eval"]
        assert [word in shown for word in words] == 5 * [progress]
        discover(a, batches()[0][0], progress=progress)
        assert ("discover, eval" in capsys.readouterr().err) == progress


def test_importing_modeconn_imports_none_of_what_is_used_rarely():
    rare = {"matplotlib", "scipy", "typer", "tqdm.auto", "torch.export", "torchvision"}
    script = (
        "import sys, torch; torch_has = set(sys.modules); import modeconn; "
        f"print({rare!r} & (sys.modules.keys() - torch_has))"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
