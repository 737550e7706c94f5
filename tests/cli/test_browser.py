"""Pages in headless Chromium: they draw without network, and menu and slider do what they say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
import torch

from modeconn import Plane, Profile
from modeconn.cli.report import parts_of, report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here; CI installs it")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-unsafe-swiftshader",
    "--virtual-time-budget=20000", "--dump-dom",
)  # fmt: skip
T = torch.linspace(0, 1, 5, dtype=torch.float64)


def seen(path, script, tmp_path, *, width=1000):
    """What a script finds in a page once it has drawn: the script is run in it, and returns what JSON can hold."""
    watch = f"""
<script>
const watched = [];
addEventListener("error", (event) => watched.push(String(event.message)));
const again = setInterval(() => {{
  if (document.body.dataset.ready !== "true") return;
  clearInterval(again);
  (async () => {{ {script} }})().then((found) => {{
    document.body.dataset.found = JSON.stringify({{ found, errors: watched }});
  }}).catch((error) => {{ document.body.dataset.found = JSON.stringify({{ found: null, errors: [String(error)] }}); }});
}}, 50);
</script>"""
    copy = tmp_path / "watched.html"
    copy.write_text(path.read_text().replace("</body>", f"{watch}</body>"))
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", copy.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found, (done.returncode, done.stderr[-500:], done.stdout[-300:])
    told = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&"))
    assert told["errors"] == []
    return told["found"]


@pytest.fixture
def page(tmp_path):
    for name, height in (("one", 1), ("other", 4)):
        profile = Profile(T, loss=1 + height * T * (1 - T), accuracy=0.9 - T / 10, arc_length=T, num_examples=50)
        profile.to_json(tmp_path / f"{name}.json")
    path = tmp_path / "report.html"
    path.write_text(report(parts_of([tmp_path / "one.json", tmp_path / "other.json"]), "two"))
    return path


CLICKS = """
const place = document.querySelector(".figure");
const until = async (holds) => {
  for (let times = 0; times < 100 && !holds(); times++) await new Promise((done) => setTimeout(done, 100));
};
const click = (one, kind) => one.dispatchEvent(new MouseEvent(kind, { bubbles: true, clientX: 0, clientY: 0 }));
const shown = () => place.data.filter((trace) => trace.visible === true).map((trace) => [trace.name, trace.y]);
const before = { axis: place.layout.yaxis.title.text, shown: shown() };
click(place.querySelector(".updatemenu-header"), "click");
await until(() => place.querySelectorAll(".updatemenu-dropdown-button").length === 3);
const buttons = [...place.querySelectorAll(".updatemenu-dropdown-button")];
const names = buttons.map((button) => button.textContent);
click(buttons[names.indexOf("accuracy")], "click");
await until(() => place.layout.yaxis.title.text.startsWith("accuracy"));
const after = { axis: place.layout.yaxis.title.text, shown: shown() };
const rail = place.querySelector(".slider-rail-touch-rect").getBoundingClientRect();
const where = { bubbles: true, clientX: rail.left + rail.width / 2, clientY: rail.top + rail.height / 2 };
place.querySelector(".slider-rail-touch-rect").dispatchEvent(new MouseEvent("mousedown", where));
document.dispatchEvent(new MouseEvent("mouseup", where));
await until(() => place.layout.shapes);
return { before, names, after, mark: place.layout.shapes.map((shape) => shape.x0) };
"""


def test_menu_and_slider_of_a_report_work(page, tmp_path):
    found = seen(page, CLICKS, tmp_path)
    assert found["names"] == ["loss", "accuracy", "error"]
    assert found["before"]["axis"].startswith("loss") and found["after"]["axis"].startswith("accuracy")
    assert [name for name, _ in found["before"]["shown"]] == ["one", "other"] == [n for n, _ in found["after"]["shown"]]
    assert found["before"]["shown"][1][1] == (1 + 4 * T * (1 - T)).tolist()
    assert found["after"]["shown"][0][1] == pytest.approx((90 - 10 * T).tolist())
    assert found["mark"] == [pytest.approx(0.5, abs=0.05)]


def test_a_report_fits_on_a_phone(page, tmp_path):
    script = (
        "return [document.documentElement.scrollWidth, innerWidth, document.querySelector('.main-svg').clientWidth]"
    )
    content, screen, figure = seen(page, script, tmp_path, width=500)
    assert content <= screen and 0 < figure <= screen


def test_a_surface_is_drawn(tmp_path):
    axis = torch.arange(3, dtype=torch.float64)
    values = torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]).double()
    plane = Plane(axis, axis, {"loss": values}, networks={"a": axis[:2]}, own={"loss": axis[:1] + 0.1}, limit=2.0)
    plane.to_html(tmp_path / "plane.html")
    script = """
const place = document.querySelector(".figure");
return [place.data.map((trace) => trace.type), place.querySelectorAll("canvas").length];
"""
    kinds, canvases = seen(tmp_path / "plane.html", script, tmp_path)
    assert kinds == ["mesh3d", "scatter3d"] and canvases >= 1
