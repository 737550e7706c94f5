"""A curve of a user's own: the straight line with a bow of one control point."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import modeconn
from modeconn.cli.app import app
from modeconn.curves import Curve
from tests.cases import same_bits

# -- what the user writes


@dataclass(frozen=True)
class Bow(Curve):
    """The straight line, bent by a power of a sine towards the point in the middle."""

    power: int = 2
    free_ends: bool = False

    @property
    def num_control_points(self) -> int:
        return 3

    def _basis(self, t: Tensor) -> Tensor:
        bend = torch.sin(math.pi * t) ** self.power
        return torch.stack([1 - t - bend / 2, bend, t - bend / 2], -1)

    def _derivative(self, t: Tensor) -> Tensor:
        bend = self.power * math.pi * torch.cos(math.pi * t) * torch.sin(math.pi * t) ** (self.power - 1)
        return torch.stack([-1 - bend / 2, bend, 1 - bend / 2], -1)


# -- what it can do


@pytest.fixture(scope="module")
def fitted(digits_line):
    a, b, train, _ = digits_line
    recipe = modeconn.Recipe(epochs=2)
    return modeconn.fit_curve(a, b, train, align=True, curve=Bow(power=4), recipe=recipe, seed=1)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_it_saves_and_loads_with_its_class_and_settings(fitted, tmp_path, t):
    fitted.save(tmp_path / "c")
    loaded = modeconn.Connection.load(tmp_path / "c", curve=Bow)
    assert loaded.curve == Bow(power=4) and same_bits(loaded.model_at(t), fitted.model_at(t))
    assert loaded.length() == fitted.length() > loaded.straight().length()


def test_a_file_without_its_class_says_which_it_needs(fitted, tmp_path):
    fitted.save(tmp_path / "c")
    with pytest.raises(ValueError, match=r"of the class tests.extensions.test_curve:Bow, .* Pass curve=Bow"):
        modeconn.Connection.load(tmp_path / "c")
    with pytest.raises(ValueError, match=r"of the class .*:Bow, not of Bezier"):
        modeconn.Connection.load(tmp_path / "c", curve=modeconn.Bezier)
    with pytest.raises(ValueError, match=r"curve must be a class or None, got curve=Bow\("):
        modeconn.Connection.load(tmp_path / "c", curve=Bow(4))


def test_the_command_line_takes_its_class(fitted, tmp_path):
    from typer.testing import CliRunner

    fitted.save(tmp_path / "c")
    command = ["evaluate", str(tmp_path / "c"), "--data", "digits", "--points", "3"]
    result = CliRunner().invoke(app, [*command, "--curve-class", "tests.extensions.test_curve:Bow"])
    assert result.exit_code == 0 and "Profile(3 points" in result.stdout
    assert "--curve-class package.module:Bow" in CliRunner().invoke(app, [*command, "--overwrite"]).stderr
    assert "test_curve:Bow(power=4, free_ends=False)" in CliRunner().invoke(app, ["info", str(tmp_path / "c")]).stdout


def test_a_curve_that_no_file_could_hold_is_refused_before_the_training(digits_line):
    a, b, train, _ = digits_line

    class Plain(Curve):
        free_ends, num_control_points = False, 2

        def _basis(self, t: Tensor) -> Tensor:
            return torch.stack([1 - t, t], -1)

        def _derivative(self, t: Tensor) -> Tensor:
            return torch.stack([-torch.ones_like(t), torch.ones_like(t)], -1)

    @dataclass(frozen=True)
    class WithTensor(Bow):
        bend: object = None

    with pytest.raises(ValueError, match=r"Plain says nothing of its settings, .* @dataclass"):
        modeconn.fit_curve(a, b, train, curve=Plain())
    with pytest.raises(ValueError, match=r"no file could hold the settings of .*WithTensor"):
        modeconn.fit_curve(a, b, train, curve=WithTensor(bend=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"curve must be a Curve, got curve=<class"):
        modeconn.fit_curve(a, b, train, curve=Bow)


def test_a_script_saves_what_another_program_loads(tmp_path):
    script = Path(__file__).read_text(encoding="utf-8").partition("# -- what it can do")[0]
    script = script.replace("from tests.cases import same_bits\n", "")
    (tmp_path / "mine.py").write_text(
        script + "\na, b = (modeconn.models.mlp(4, (5,), 3, seed=s) for s in (1, 2))\n"
        "if __name__ == '__main__':\n"
        "    from modeconn.curves.path import Path as _Path\n"
        "    path = _Path.straight_between(a, b)\n"
        "    points = Bow().initial_control_points(*path.control_points)\n"
        "    modeconn.Connection(_Path(a, Bow(), points, path.buffers)).save('c')\n"
    )
    subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, check=True)
    loaded = modeconn.Connection.load(tmp_path / "c", curve=Bow)  # the file names __main__:Bow
    assert same_bits(loaded.model_at(0), modeconn.models.mlp(4, (5,), 3, seed=1))
