"""Recipes: the options of a command as a TOML file, which it reads in their place, and which its results hold."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

_COMMAND = "command"
_NAMES_NO_OPTION = ("recipe", "help", "dry_run", "progress", "overwrite")


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Let options that the command line does not give be those of a file."""
    if path is None:
        return None
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{str(path)!r} is no TOML file: {error}.") from None
    own = context.info_name
    if told.pop(_COMMAND, own) != own:
        raise typer.BadParameter(f"{str(path)!r} is for another command than modeconn {own}.")
    known = {_key(parameter): parameter for parameter in context.command.params}
    if unknown := [name for name in told if name not in known]:
        raise typer.BadParameter(f"{str(path)!r}: modeconn {own} has no option {unknown[0]!r}.")
    given = {known[key].name: _as_given(known[key], key, value) for key, value in told.items()}
    context.default_map = {**(context.default_map or {}), **given}
    return path


Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        exists=True,
        dir_okay=False,
        is_eager=True,
        callback=_take,
        help="A TOML file of arguments and options by name, out_shard_size = '2GB'; those on the command line win.",
    ),
]


def _key(parameter: Any) -> str:
    """Return the name under which a file has a parameter."""
    if parameter.param_type_name == "argument":
        return parameter.name
    return max(parameter.opts, key=len).removeprefix("--").replace("-", "_")


def _as_given(parameter: Any, key: str, value: Any) -> Any:
    """Return a value of a file as the command line would have it."""
    is_list = isinstance(value, list)
    if any(isinstance(one, (dict, list)) for one in (value if is_list else [value])):
        raise typer.BadParameter(f"a recipe holds texts, numbers, truth values and lists of them, got {key} = {value}.")
    if parameter.multiple or parameter.nargs != 1:
        if not is_list:
            raise typer.BadParameter(f"{key} is a list in a recipe, got {value!r}.")
        return tuple(value)
    if is_list:
        return ",".join(map(str, value))
    return value if isinstance(value, (bool, int, float)) else str(value)


def as_recipe(context: typer.Context) -> str:
    """Return the arguments and options of the command that is at work, those that are not as they would be without."""
    lines = [f"{_COMMAND} = {json.dumps(context.info_name)}"]
    for parameter in context.command.params:
        value, source = context.params.get(parameter.name), context.get_parameter_source(parameter.name)
        if value is None or parameter.name in _NAMES_NO_OPTION or source is None or source.name == "DEFAULT":
            continue
        lines.append(f"{_key(parameter)} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(str(value), ensure_ascii=False)
