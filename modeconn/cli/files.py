"""What a file of modeconn is: told in words, or drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modeconn import Comparison, DeepAlign, PermutationSpec, Relabelling, plot
from modeconn.learning.checkpoint import ALIGNER, FIT, TRAINING
from modeconn.learning.history import History
from modeconn.measure.along import AlongCurve
from modeconn.tools import files, provenance
from modeconn.tools.table import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_Correlation = dict[str, list[float]]


def describe_file(path: Path) -> str:
    """Return what ``modeconn info`` prints of a file."""
    if _is_json(path):
        kind, content = _read_json(path)
        text, made_by = (_correlation_table(content) if isinstance(content, dict) else repr(content)), made_by_of(path)
    else:
        tensors, about = files.read(path)
        made_by = about.get(provenance.ATTRIBUTE)
        if about["kind"] not in _SAFETENSORS:
            raise ValueError(f"{str(path)!r} is a {about['kind']}, of which this version of modeconn knows nothing.")
        kind, text = about["kind"], _SAFETENSORS[about["kind"]](path, tensors, about)
        kind = about["relabelling"]["kind"] if kind == "relabelling" else kind
    return f"{path}: {kind}\n{text}{_provenance(made_by)}"


def made_by_of(path: Path) -> dict[str, Any] | None:
    """Return how a JSON file of modeconn says that it was made."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    found = content.get(provenance.ATTRIBUTE) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def _provenance(made_by: dict[str, Any] | None) -> str:
    if not made_by:
        return ""
    lines = {"made by": made_by.get("command", made_by.get("call"))}
    if "command" in made_by and "call" in made_by:
        lines["call"] = made_by["call"]
    lines |= {f"its {name}": described for name, described in dict(made_by.get("data", {})).items()}
    lines["versions"] = ", ".join(f"{name} {version}" for name, version in dict(made_by.get("versions", {})).items())
    return f"\n{_lines(lines)}"


def draw_files(paths: Sequence[Path], labels: Sequence[str] | None, quantity: str | None, ax: Axes) -> None:
    """Draw results along curves, reports of alignments or connections, all of one kind, or one comparison."""
    read = [_read_json(path) if _is_json(path) else ("connection", _history(path)) for path in paths]
    kinds, contents = zip(*read, strict=True)
    if len(set(kinds)) > 1:
        raise ValueError(
            f"one figure shows files of one kind, got {', '.join(map(_with_article, sorted(set(kinds))))}."
        )
    if kinds[0] == "connection":
        plot.history(*contents, labels=labels, ax=ax)
    elif kinds[0] == "report of an alignment":
        plot.correlation(*contents, labels=labels, ax=ax)
    elif len(contents) > 1 and kinds[0] in ("comparison", "robust profile"):
        raise ValueError(f"one figure shows one {kinds[0]}, got {len(contents)}.")
    elif kinds[0] == "comparison":
        plot.comparison(contents[0], column=quantity or "line", ax=ax)
    elif kinds[0] == "robust profile":
        contents[0].plot(quantity=quantity, ax=ax)
    else:
        plot.profile(*contents, labels=labels, quantity=quantity or next(iter(contents[0].values)), ax=ax)


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"{"


def _read_json(path: Path) -> tuple[str, AlongCurve | Comparison | _Correlation]:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if "correlation" in content:
            return "report of an alignment", content["correlation"]
        if "kind" in content:
            result = AlongCurve.from_json(text)
            return _in_words(type(result).__name__), result
        return "comparison", Comparison.from_json(text)
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        raise ValueError(
            f"{str(path)!r} is no result along a curve, no comparison and no report of an alignment."
        ) from None


def _in_words(name: str) -> str:
    """Return what a class is called in a sentence: RobustProfile is a robust profile."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def _history(path: Path) -> History | None:
    kept = files.read(path, "connection")[1]["history"]
    return None if kept is None else History(**kept)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _correlation_table(correlation: _Correlation) -> str:
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in correlation.items()]
    return table(["mean correlation", "before", "after"], rows)


def _about_connection(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    name, arguments = about["curve"]
    points, weights = tensors["control_points"].shape
    history = about["history"]
    lines = {
        "curve": f"{name}({', '.join(f'{key}={value}' for key, value in arguments.items())}), {points} control points",
        "model": _model(about),
        "weights": f"{weights:,} of {str(tensors['control_points'].dtype).removeprefix('torch.')}",
        "b": "as it was" if about.get("relabelling", about.get("permutation")) is None else "relabelled",
        "fit": "none" if history is None else _fit(history),
    }
    return _lines(lines)


def _about_model(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    count = sum(tensor.numel() for tensor in tensors.values())
    return _lines({"model": _model(about), "numbers": f"{count:,} in {len(tensors)} parameters and buffers"})


def _about_relabelling(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    relabelling = Relabelling.load(path)
    return f"{relabelling!r} of a\n{relabelling.spec!r}"


def _about_checkpoint(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    settings = {name: value for name, value in about["settings"].items() if not name.startswith("parameter ")}
    if "steps" in about:
        done = f"{about['steps']} steps"
    elif "epochs" in about:
        done = f"{about['epochs']} epochs"
    elif "progress" in about:
        done = f"{about['progress']['epoch']} epochs and {about['progress']['batch']} batches"
    else:  # PAM on a straight line, or in its exact mode
        turns = about["refinement"]["turns"] if "refinement" in about else about["turns"]
        done = f"{len(turns)} turns of PAM and {len(about.get('loss', ()))} steps of descent"
    return _lines({"done": done, **settings})


def _about_spec(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    return repr(PermutationSpec.load(path))


def _about_deep_align(path: Path, tensors: dict[str, Any], about: dict[str, Any]) -> str:
    aligner = DeepAlign.load(path)
    step, value = min(aligner.fitted.validation, key=lambda one: one[1])
    lines = {**about["settings"], "fitted": aligner.fitted, "validation": f"{value:.4f}, best after {step} steps"}
    return f"{_lines(lines)}\n{aligner.fitted.encoder.graph.spec!r}"


_SAFETENSORS = {
    "deep align": _about_deep_align,
    "connection": _about_connection,
    "model": _about_model,
    "relabelling": _about_relabelling,
    "permutation": _about_relabelling,  # what older files are called
    "spec": _about_spec,
    FIT: _about_checkpoint,
    TRAINING: _about_checkpoint,
    ALIGNER: _about_checkpoint,
}


def _fit(history: dict[str, Any]) -> str:
    losses, turns = history["loss"], history["turns"]
    learned = [f"{len(losses)} epochs"] * bool(losses) + [f"{len(turns)} turns of PAM"] * bool(turns)
    end = f", training loss {losses[-1]:.4g}" if losses else ""
    return f"{' and '.join(learned) or 'nothing'} in {history['seconds']:.1f} s{end}"


def _model(about: dict[str, Any]) -> str:
    if about["model"] is None:
        return "not of modeconn.models; give --model"
    name, arguments = about["model"]
    return f"{name}({', '.join(f'{key}={_short(value)}' for key, value in arguments.items())})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"<{len(value)} values>"


def _lines(facts: dict[str, Any]) -> str:
    width = max(map(len, facts))
    return "\n".join(f"  {name:{width}}  {value}" for name, value in facts.items())
