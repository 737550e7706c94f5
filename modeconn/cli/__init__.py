"""The command line: read files, call one function, write files."""

from __future__ import annotations


def main() -> None:
    """Run ``modeconn``."""
    import warnings

    import typer

    from modeconn.cli.app import app
    from modeconn.tools.processes import joined

    def show_warning(message: Warning | str, *args: object, **kwargs: object) -> None:
        if joined().is_first:
            typer.echo(f"modeconn: warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        app(prog_name="modeconn")
