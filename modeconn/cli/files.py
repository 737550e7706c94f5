"""What a file is that one of the commands wrote, told in words, and the results that it holds."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modeconn import Comparison, DeepAlign, PermutationSpec, Plane, Predictions, Relabelling, tensor_files
from modeconn.learning.checkpoint import ALIGNER, FIT, TRAINING
from modeconn.learning.history import History
from modeconn.measure.along import AlongCurve
from modeconn.models.states import states_of_pickle, states_of_safetensors
from modeconn.symmetry.relabelling import MOVED, NotImportedError, unpack
from modeconn.symmetry.report import SymmetryReport
from modeconn.tools import files, provenance
from modeconn.tools.door import shortened
from modeconn.tools.json_files import KIND, from_json
from modeconn.tools.measurements import read_records
from modeconn.tools.table import table

CORRELATIONS, DEMO = "correlations of an alignment", "demo"
"""The kinds of JSON files that only commands write."""

_FIGURES = {b"\x89PNG": "PNG", b"%PDF": "PDF", b"<?xml": "SVG"}
_PICKLES = (b"PK\3\4", b"\x80")


@dataclass(frozen=True)
class File:
    """A file that was read.

    Args:
        kind: What it is, in words.
        text: What it holds, for people.
        made_by: How it says that it was made.
        result: The result that it holds, for figures; None if it holds none.
        history: How what it holds was learned; None if that is not in it.
        relabelling: The relabelling that it holds or in which b was relabelled; None if there is none.
        lists: Names, without their endings, of files beside it, in the order in which to show them.
    """

    kind: str
    text: str
    made_by: Any = None
    result: Any = None
    history: History | None = None
    relabelling: Relabelling | None = None
    lists: Sequence[str] = ()


def describe_file(path: Path) -> str:
    """Return what ``modeconn info`` prints of a file."""
    file = _read_folder(path) if path.is_dir() else read_file(path)
    return "\n".join([f"{path}: {file.kind}", *filter(None, [file.text, _provenance(file.made_by)])])


def made_by_of(path: Path) -> dict[str, Any] | None:
    """Return how a file of modeconn says that it was made; None for any other file."""
    try:
        with path.open("rb") as file:
            is_text = not _is_safetensors(file.read(4096), path.stat().st_size)
        content = json.loads(path.read_text(encoding="utf-8")) if is_text else files.read(path)[1]
    except (ValueError, RecursionError):
        return None
    found = content.get(provenance.ATTRIBUTE) if isinstance(content, dict) else None
    return found if isinstance(found, dict) else None


def is_network(path: Path) -> bool:
    """Whether a file holds one network: one that modeconn wrote, or a state dict of another program."""
    with path.open("rb") as file:
        begin = file.read(4096)
    if not _is_safetensors(begin, path.stat().st_size):
        return begin.startswith(_PICKLES)
    return not files.is_ours(path) or files.read(path)[1]["kind"] == "model"


def _read_folder(path: Path) -> File:
    held = tensor_files.TensorFiles(path)
    shards = sorted({entry.file for entry in held.entries.values()})
    types = Counter(str(entry.dtype).removeprefix("torch.") for entry in held.entries.values())
    count = sum(math.prod(entry.shape) for entry in held.entries.values())
    facts = {
        "tensors": f"{len(held.entries)} in {len(shards)} file{'s' * (len(shards) > 1)}, {held.num_bytes:,} bytes",
        "numbers": f"{count:,}, {', '.join(name for name, _ in types.most_common())}",
    }
    return File("folder of a model's tensors", _lines(facts), tensor_files.made_by(shards[0]) if shards else None)


def read_file(path: Path) -> File:
    """Read a file of whatever kind.

    Raises:
        ValueError: If it is none that modeconn or torch wrote, or damaged.
        OSError: If it cannot be read.
    """
    files.check_regular(path)
    with path.open("rb") as file:
        begin = file.read(4096)
    if not begin:
        raise ValueError(f"{str(path)!r} is empty.")
    if b"<VTKFile" in begin[:200]:
        return File("VTK image data", _lines({"bytes": path.stat().st_size}))
    if begin.startswith(b"<!DOCTYPE html>"):
        return File("page", _lines({"bytes": path.stat().st_size}))
    if (names := _arrays_in(path)) is not None:
        return _read_arrays(path, names)
    for signature, name in _FIGURES.items():
        if begin.startswith(signature):
            return File(f"{name} figure", _lines(_about_figure(path, name)))
    if _is_safetensors(begin, path.stat().st_size):
        return _read_safetensors(path)
    if begin.startswith(_PICKLES):
        return File("file of torch.save", _about_states(states_of_pickle(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return _read_safetensors(path)  # which says what is wrong with it
    return _read_text(path, text)


def _arrays_in(path: Path) -> list[str] | None:
    """Return the names of the arrays of numpy in a file; None if it is something else."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return [name.removesuffix(".npy") for name in names] if all(name.endswith(".npy") for name in names) else None


def _read_arrays(path: Path, names: Sequence[str]) -> File:
    if "probabilities" in names:
        found = Predictions.load(path)
        return File("predictions", repr(found), found.made_by)
    return File("arrays of numpy", _lines({"arrays": ", ".join(names)}))


def _is_safetensors(begin: bytes, size: int) -> bool:
    """Whether a file begins with the length of a header and the header; no text has a length so small."""
    return begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> File:
    if not files.is_ours(path):
        made_by = tensor_files.made_by(path)
        kind = "safetensors file of another program" if made_by is None else "tensors of a model"
        return File(kind, _about_states(states_of_safetensors(path)), made_by)
    with files.opened(path) as (tensors, about):
        kind, made_by = about["kind"], about.get(provenance.ATTRIBUTE)
        if kind not in _SAFETENSORS:
            raise ValueError(f"{str(path)!r} is a {kind[:60]}, of which this version of modeconn knows nothing.")
        text = _SAFETENSORS[kind](path, tensors, about)
        relabelling = _relabelling(tensors, about)
        if kind == "connection":
            history = History(**about["history"]) if about["history"] else None
        else:
            history = _history_so_far(about) if kind == FIT else None
        name = about["relabelling"]["kind"] if kind == "relabelling" else kind
        return File(name, text, made_by, history=history, relabelling=relabelling)


def _read_text(path: Path, text: str) -> File:
    try:
        if not text.lstrip().startswith("{"):
            return _read_csv(text)
        if _is_records(text):
            return File("finished measurements", _lines({"measurements": len(read_records(path))}))
        return _read_json(text)
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{str(path)!r}: {shortened(error, 600)}") from None


def _is_records(text: str) -> bool:
    return re.match(r'\s*\{"[0-9a-f]{32}": \{', text) is not None  # begins with a digest of settings


def _read_json(text: str) -> File:
    content = from_json(text, "file of modeconn")
    kind = content.get(KIND, _kind_of_older(content))
    made_by = content.get(provenance.ATTRIBUTE)
    if kind == CORRELATIONS:
        correlation = _correlations(content)
        return File(kind, _correlation_table(correlation), made_by, correlation)
    if kind == DEMO:
        lists = [str(name) for _, name in _items(content.get("files"))]  # older files have none
        return File(kind, _demo_table(content), made_by, lists=lists)
    if kind == "Comparison":
        comparison = Comparison.from_json(text)
        return File("comparison", repr(comparison), made_by, comparison)
    if kind == "Plane":
        plane = Plane.from_json(text)
        return File("plane", repr(plane), made_by, plane)
    if kind == "SymmetryReport":
        return File("report of symmetries", repr(SymmetryReport.from_json(text)), made_by)
    if kind == "PermutationSpec":
        return File("spec", repr(PermutationSpec.from_json(text)), made_by)
    if isinstance(kind, str):
        result = AlongCurve.from_json(text)
        return File(_in_words(type(result).__name__), repr(result), made_by, result)
    raise ValueError(
        "it is no result along a curve, no plane, no comparison, no correlations of an alignment and no report of "
        "symmetries."
    )


def _kind_of_older(content: Mapping[str, Any]) -> str | None:
    """Return the kind of a JSON file of a version that did not write it."""
    signs = {"correlation": CORRELATIONS, "values": "Comparison", "sizes": "PermutationSpec"}
    return next((kind for sign, kind in signs.items() if sign in content), None)


def _read_csv(text: str) -> File:
    header, *rows = [*csv.reader(io.StringIO(text))] or [[]]
    known = {"t": "results along a curve", "pair": "a comparison", "epoch": "epochs of training", "x": "a plane"}
    if len(header) < 2 or header[0] not in known or any(len(row) != len(header) for row in rows) or not rows:
        raise ValueError("it is no file that modeconn wrote, or damaged.")
    facts = _lines({"holds": known[header[0]], "rows": len(rows), "columns": ", ".join(header)})
    is_along = header[0] == "t" and header[1] != "attack"
    return File("table", facts, result=_along_curve(header, rows) if is_along else None)


def _along_curve(header: list[str], rows: list[list[str]]) -> AlongCurve:
    columns = {
        name: torch.tensor([float(value) for value in column], dtype=torch.float64)
        for name, column in zip(header, zip(*rows, strict=True), strict=True)
    }
    return AlongCurve(columns.pop("t"), columns, arc_length=columns.pop("arc_length", None))


def _about_figure(path: Path, name: str) -> dict[str, Any]:
    if name != "PNG":
        return {"bytes": path.stat().st_size}
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            made_by = getattr(image, "text", {}).get("Description")
            return {"pixels": "x".join(map(str, image.size)), **({"made by": made_by} if made_by else {})}
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged ({shortened(error, 600)}).") from None


def _about_states(states: Mapping[str, Mapping[str, Any]]) -> str:
    if not states:
        return "  no state dict"
    return _lines(
        {
            place or "state dict": f"{len(state)} tensors, {sum(one.numel() for one in _tensors(state)):,} numbers"
            for place, state in states.items()
        }
    )


def _tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if isinstance(value, torch.Tensor)]


def _provenance(made_by: Any) -> str:
    if not isinstance(made_by, Mapping):
        return ""
    lines = {"made by": made_by.get("command", made_by.get("call"))}
    if "command" in made_by and "call" in made_by:
        lines["call"] = made_by["call"]
    lines |= {f"its {name}": described for name, described in _items(made_by.get("data"))}
    if isinstance(made_by.get("recipe"), str):
        lines["recipe"] = made_by["recipe"].strip()
    if made_by.get("processes"):
        lines["together"] = f"{made_by['processes']} processes"
    lines["versions"] = ", ".join(f"{name} {version}" for name, version in _items(made_by.get("versions")))
    return _lines(lines)


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def _history_so_far(about: Mapping[str, Any]) -> History | None:
    done = about.get("progress")
    return History(done["loss"], done["loss_by_t"], done["seconds"]) if done and done["loss"] else None


def _in_words(name: str) -> str:
    """Return what a class is called in a sentence: RobustProfile is a robust profile."""
    return "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name).strip()


def check_holds_networks(*paths: Path) -> None:
    """Raise a ValueError if a file is a result that a command wrote as text, of which there is nothing to measure."""
    for path in filter(Path.is_file, paths):
        with path.open("rb") as file:
            is_text = file.read(1) == b"{"
        if is_text:
            raise ValueError(
                f"{str(path)!r} is {with_article(read_file(path).kind)}, not a connection or a network, of which there "
                f"is something to measure. modeconn info says what made it."
            )


def with_article(kind: str) -> str:
    """Return what something is, with "a" or "an" before it."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _correlations(content: Mapping[str, Any]) -> dict[str, list[float]]:
    try:
        return {name: [float(before), float(after)] for name, (before, after) in content["correlation"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"it is no {CORRELATIONS} ({type(error).__name__}: {shortened(error, 600)}).") from None


def _correlation_table(correlation: dict[str, list[float]]) -> str:
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in correlation.items()]
    return table(["mean correlation", "before", "after"], rows)


def demo_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return the table of a demo as text: numbers by connection and column, fractions of right answers in percent."""
    forms = {"loss": "{:.3f}", "barrier": "{:.4f}", "seconds": "{:.1f}"}
    cells = [
        [name, *(forms.get(column.split()[0], "{:.1%}").format(value) for column, value in row.items())]
        for name, row in rows.items()
    ]
    return table(["", *next(iter(rows.values()))], cells)


def _demo_table(content: Mapping[str, Any]) -> str:
    try:
        return demo_table(content["table"])
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise ValueError(f"it is no {DEMO} ({type(error).__name__}: {shortened(error, 600)}).") from None


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


def _relabelling(tensors: Mapping[str, Any], about: Mapping[str, Any]) -> Relabelling | None:
    """Return the relabelling of a connection, or that a file holds; None also of a kind that nobody imported."""
    holds = {"connection": MOVED, "relabelling": "", "permutation": ""}
    if about["kind"] not in holds:
        return None
    try:
        return unpack(
            tensors, {"permutation": about["spec"]} if about["kind"] == "permutation" else about, holds[about["kind"]]
        )
    except NotImportedError:
        return None


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


_SAFETENSORS: dict[str, Callable[[Path, dict[str, Any], dict[str, Any]], str]] = {
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
    width = max(len("its loader"), *map(len, facts))  # so that what a file is and how it was made stand in line
    between = "\n" + " " * (width + 4)
    return "\n".join(f"  {name:{width}}  {between.join(str(value).splitlines())}" for name, value in facts.items())
