"""Where results go: files that can be written, that replace nothing of another command, and what is printed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

import modeconn
from modeconn import Comparison
from modeconn.cli.files import made_by_of
from modeconn.measure.along import AlongCurve
from modeconn.tools import provenance
from modeconn.tools.writing import check_writable

STDOUT = Path("-")


def check_outputs(*paths: Path | None) -> None:
    """Raise unless each file that is asked for can be written, and to a place of its own."""
    asked = [path for path in paths if path is not None]
    places = [path.resolve() for path in asked]
    for path, place in zip(asked, places, strict=True):
        check_writable(path)
        if places.count(place) > 1:
            raise ValueError(f"several results would be written to {str(path)!r}. Give them names that differ.")


def check_own(result: Path) -> None:
    """Raise unless a result is new, or was written by the very command that is at work."""
    if not result.exists():
        return
    made_by = made_by_of(result) or {}
    if made_by.get("command") != provenance.current_command():
        by = f", made by: {made_by['command']}" if "command" in made_by else ""
        raise ValueError(f"{str(result)!r} holds another result{by}. Choose another name, or --overwrite it.")


def check_new(*paths: Path | None, read: Sequence[Path] = (), overwrite: bool) -> None:
    """Raise unless files can be written, are none of those that are read, and replace no result of another command."""
    check_outputs(*paths)
    for path in (path for path in paths if path is not None):
        if path.resolve() in [one.resolve() for one in read]:
            raise ValueError(f"{str(path)!r} is one of the files that are read. Write to another one.")
        if not overwrite:
            check_own(path)


def result_files(base: Path, out: Path | None, *, overwrite: bool) -> list[Path]:
    """Return the JSON and CSV files whose names begin with ``out`` (or are one of these), by default with ``base``.

    They can be written, and under a default name there is no result of another command yet. ``-`` means no files.
    """
    if out == STDOUT:
        return []
    base = base if out is None else out.with_suffix("") if out.suffix in (".json", ".csv") else out
    results = [base.with_name(base.name + ending) for ending in (".json", ".csv")]
    check_outputs(*results)
    if out is None and not overwrite:
        check_own(results[0])
    return results


def write_result(found: AlongCurve | Comparison, results: list[Path]) -> None:
    """Write a result as JSON and CSV, and say so; without files, print the JSON alone."""
    if not results:
        typer.echo(found.to_json(), nl=False)
        return
    found.to_json(results[0])
    found.to_csv(results[1])
    typer.echo(repr(found))
    typer.echo(f"Wrote {results[0]}, {results[1]}")


def one_line(profile: modeconn.Profile) -> str:
    """Return loss and accuracy of one network."""
    accuracy = "" if profile.accuracy is None else f", accuracy {profile.accuracy[0]:.2%}"
    return f"loss {profile.loss[0]:.4f}{accuracy}"
