"""How commands run: what the library raises is one line in their words, and what they make names them."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from modeconn.cli import parse
from modeconn.cli.options import say
from modeconn.cli.sharing import launched_together, shared_command
from modeconn.tools import processes, program, provenance

_INTERRUPTED, _BROKEN_PIPE, _TERMINATED = 130, 141, 143  # 128 + SIGINT, SIGPIPE and SIGTERM, as shells have it

_OPTIONS = {
    "num_points": "--points",
    "num_examples": "--examples",
    "num_steps": "--steps",
    "template": "--model",
    "example_input": "--input-shape",
    "curve": "--curve-class",
    "loader": "--data",
    "align": "--method",
}
"""What the command line calls arguments of the library that have another name there."""

_PHRASES = {
    "example_input=, a tensor (or tuple, or dict of keyword inputs) that the model accepts": "--input-shape N,C,H,W, "
    "such as 2,3,32,32, or 2,16:int64 for tokens",
}
"""What is written in another way on the command line than in Python."""

_MEANT = {
    **_OPTIONS,
    "lr": "--optimizer, such as adam:lr=0.01",
    "learning_rate": "--optimizer, such as adam:lr=0.01",
    "momentum": "--optimizer, such as sgd:lr=0.1,momentum=0.9",
    "metrics": "--metric",
    "num_epochs": "--epochs",
}
"""What stands for options that one may ask for by another name."""


def options_of(context: Any) -> set[str]:
    """Return the options of the command at work."""
    command = getattr(context, "command", None)
    named = command.get_command(context, context.invoked_subcommand or "") if hasattr(command, "get_command") else None
    return {name for parameter in getattr(named, "params", ()) for name in parameter.opts}


def _in_options(message: str, context: Any) -> str:
    """Return an error of the library with the options of the command at work in place of Python's arguments."""
    own = options_of(context)
    names = {name.removeprefix("--").replace("-", "_"): name for name in own} | _OPTIONS
    calls = re.findall(r"\b[A-Z]\w*\([^()]*\)", message)  # such as DataLoader(loader, batch_size=128): Python's own
    for number, call in enumerate(calls):
        message = message.replace(call, f"\0{number}\0")
    for phrase, other in _PHRASES.items():
        message = message.replace(phrase, other)
    for name, option in names.items():
        if option not in own:
            continue
        message = re.sub(rf"(?<![\w.-]){name}=True\b", option, message)
        message = re.sub(rf"(?<![\w.-]){name}=(?=[^\s,.;)])", f"{option} ", message)
        message = re.sub(rf"(?<![\w.-]){name}=", option, message)
        if "_" in name:
            message = re.sub(rf"(?<![\w.'-]){name}(?![\w='])", option, message)
    in_python = dict.fromkeys(re.findall(r"(?<![\w.'-])[a-z]\w*=(?=[\s,.;:)]|$)", message))
    if in_python:
        are = "is an argument" if len(in_python) == 1 else "are arguments"
        message += f" ({' and '.join(in_python)} {are} in Python, which no option stands for.)"
    for number, call in enumerate(calls):
        message = message.replace(f"\0{number}\0", call)
    return message


class Group(TyperGroup):
    """Turns what the library raises into one line on stderr, and lets all that is made say by which command."""

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:
        """Run the program; all files that are written meanwhile name the command."""
        given = sys.argv[1:] if args is None else list(args)
        with provenance.command(shlex.join(["modeconn", *given])):
            return super().main(given, **settings)

    def invoke(self, context: Any) -> Any:
        """Run a command, in processes of one launcher as one."""
        try:
            with launched_together():
                return self._invoke(context)
        except ValueError as error:  # of the launcher
            say(f"error: {error}")
            raise typer.Exit(1) from None

    def _invoke(self, context: Any) -> Any:
        them = processes.joined()
        try:
            if program.is_program():  # from here on an interruption is said in words; before, it ends in silence
                program.interrupt()
            with shared_command() as them:
                return super().invoke(context)
        except BrokenPipeError:  # whoever reads the output has seen enough
            sys.stdout = open(os.devnull, "w")  # until the process ends, which would write to it
            raise typer.Exit(_BROKEN_PIPE) from None
        except processes.OtherProcessError as error:
            if them.speaker is None and them.says_what_was_lost():  # otherwise the one that failed says it
                say(f"error: {error}")
            raise typer.Exit(1) from None
        except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
            if them.speaks:
                said = str(error)
                say(f"error: {said if isinstance(error, parse.OptionError) else _in_options(said, context)}")
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if them.is_first:
                say("interrupted.")
            raise typer.Exit(_TERMINATED if program.was_terminated else _INTERRUPTED) from None
        except Exception as error:
            meant = _MEANT.get(str(getattr(error, "option_name", "")).removeprefix("--").replace("-", "_"), "")
            if meant.partition(",")[0] in options_of(context):
                error.possibilities = [meant]  # type: ignore[attr-defined]  # not those that are spelled alike
            code = getattr(error, "exit_code", None)  # of a usage error, which is printed once
            if code is None or them.speaks:
                raise
            time.sleep(1)  # the first process prints it later than all others that go wrong together
            raise typer.Exit(code) from None
