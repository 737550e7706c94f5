"""Draw the stages of the package and what each imports, read from the code: ``python docs/draw_architecture.py``.

An arrow leads from a stage to one that imports it; arrows that others imply are left out, so that data flows down.
"""

from __future__ import annotations

import ast
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "modeconn"
OUTSIDE = {"_version", "__init__", "__main__"}


def names_of_the_package() -> dict[str, str]:
    """Return the stage of each name that the package offers."""
    found = {path.name: path.name for path in PACKAGE.iterdir() if path.is_dir()}
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modeconn."):
            found |= {alias.asname or alias.name: node.module.split(".")[1] for alias in node.names}
    return found


def imports() -> dict[str, set[str]]:
    """Return which stages each stage imports, by name: folders, and files beside them."""
    found: dict[str, set[str]] = {}
    public = names_of_the_package()
    for path in PACKAGE.rglob("*.py"):
        stage = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if stage in OUTSIDE:
            continue
        known = found.setdefault(stage, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modeconn."):
                known.add(node.module.split(".")[1])
            elif isinstance(node, ast.ImportFrom) and node.module == "modeconn":
                known |= {public[alias.name] for alias in node.names if alias.name in public}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "modeconn":
                known |= {public[node.attr]} if node.attr in public else set()
    return {stage: {one for one in known - {stage} if one not in OUTSIDE} for stage, known in found.items()}


def depth_of(stage: str, needs: dict[str, set[str]]) -> int:
    """Return how many imports lie below a stage, one upon the other."""
    return max((1 + depth_of(one, needs) for one in needs.get(stage, ())), default=0)


def below(stage: str, needs: dict[str, set[str]]) -> set[str]:
    """Return all that a stage imports, also through others."""
    return {other for one in needs.get(stage, ()) for other in ({one} | below(one, needs))}


def draw(needs: dict[str, set[str]]) -> Figure:
    """Draw stages in rows, by their depth."""
    rows: dict[int, list[str]] = {}
    for stage in sorted(needs):
        rows.setdefault(depth_of(stage, needs), []).append(stage)
    places: dict[str, tuple[float, float]] = {}
    for depth, stages in sorted(rows.items()):
        known = {stage: [places[one][0] for one in needs[stage] if one in places] for stage in stages}
        stages = sorted(stages, key=lambda stage: sum(known[stage]) / max(1, len(known[stage])))
        for number, stage in enumerate(stages):
            places[stage] = (2.6 * (number - (len(stages) - 1) / 2) + 0.5 * (depth % 2), -1.15 * depth)
    figure = Figure(figsize=(8, 0.85 * len(rows) + 0.4), layout="constrained")
    ax = figure.subplots()
    for stage, (x, y) in places.items():
        implied = {other for one in needs[stage] for other in below(one, needs)}
        for one in needs[stage] - implied:
            begin = places[one]
            ax.annotate(
                "",
                (x, y + 0.28),
                (begin[0], begin[1] - 0.28),
                arrowprops={"arrowstyle": "-|>", "color": "#2A7FBF", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
                zorder=1,
            )
        box = {"boxstyle": "round,pad=0.35", "facecolor": "#EAF2F8", "edgecolor": "#2A7FBF"}
        ax.text(x, y, stage, ha="center", va="center", fontsize=10, color="black", bbox=box, zorder=3)
    across = [x for x, _ in places.values()]
    ax.set_xlim(min(across) - 1.4, max(across) + 1.4)
    ax.set_ylim(-1.15 * max(rows) - 0.6, 0.6)
    ax.axis("off")
    return figure


if __name__ == "__main__":
    draw(imports()).savefig(HERE / "architecture.png", dpi=120)
