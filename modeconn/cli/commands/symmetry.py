"""modeconn symmetry: which units of a model may be relabelled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import modeconn
from modeconn.cli import options, parse
from modeconn.cli.options import bars
from modeconn.cli.outputs import check_outputs
from modeconn.tools.progress import bars as progress_bars


def symmetry(
    model: Annotated[
        str, typer.Argument(help="A model file, a model of the zoo, or package.module:factory.", show_default=False)
    ],
    made_by: Annotated[
        str | None,
        typer.Option("--model", help="What made the model of a file that does not say it.", show_default=False),
    ] = None,
    model_arg: options.ModelArguments = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N,C,H,W[:DTYPE]",
            help="Shape of an example input, such as 2,3,224,224 or 2,16:int64; repeat it for several inputs. "
            "Default: what the model says of itself.",
            show_default=False,
        ),
    ] = None,
    outputs: options.SelectedOutputs = None,
    symmetries: options.Symmetries = "permutation",
    untie: options.Untie = False,
    freeze: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Leave parameters of these names fixed.")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Whether to compare every tensor with its predicted relabelling.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write the report as JSON to this file.", show_default=False)] = None,
    save_spec: Annotated[
        Path | None, typer.Option(help="Write the spec to this file, for Python.", show_default=False)
    ] = None,
    progress: options.Progress = None,
) -> None:
    """Find and prove the groups of units of a model that can be relabelled.

    Prints where each group appears, how many relabellings there are, and what stays fixed and why.

    For example:

        modeconn symmetry resnet20 --model-arg width=2

        modeconn symmetry torchvision.models:resnet18 --input-shape 2,3,224,224
    """
    check_outputs(out, save_spec)
    arguments = parse.settings(model_arg)
    if Path(model).is_file():
        if arguments and made_by is None:
            raise ValueError("--model-arg is for the factory of --model, which is missing.")
        template = None if made_by is None else parse.make_model(made_by, arguments, None)
        network = options.read_network(Path(model), template)
    elif made_by is not None or Path(model).suffix in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"there is no file {model!r}.")
    else:
        network = parse.make_model(model, arguments, None)
    example = None if input_shape is None else tuple(map(parse.example_input, input_shape))
    with progress_bars(bars(progress)):
        settings = {"outputs": parse.outputs(outputs), "symmetries": symmetries, "untie": untie}
        spec = modeconn.discover(network, example, freeze=freeze or (), **settings)
        error = spec.verify(network, example) if verify else None
    typer.echo(repr(spec.report()))
    if error is not None:
        typer.echo(f"\nproved: no tensor differs from its prediction by more than {error:.1e} standard deviations")
    if out is not None:
        spec.report().to_json(out)
    if save_spec is not None:
        spec.save(save_spec)
