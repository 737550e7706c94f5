"""modeconn demo: the whole story on one data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from modeconn.cli import demo as story
from modeconn.cli import options, parse, report
from modeconn.cli.options import DataOptions, ModelOptions, RecipeOptions, bars, grouped, say
from modeconn.tools.writing import check_writable, write_text


@grouped(
    "optimizer",
    "schedule",
    "weight_decay",
    "autocast",
    "compile",
    "entry",
    "input_shape",
    "outputs",
    "symmetries",
    "untie",
    data="digits",
)
def demo(
    data: DataOptions,
    shape: ModelOptions,
    recipe: RecipeOptions,
    out: Annotated[Path, typer.Option(help="Folder for figures, connections and numbers.")] = Path("modeconn-demo"),
    curve_epochs: Annotated[int | None, typer.Option(help="The same for curves.", rich_help_panel="Recipe")] = None,
    points: Annotated[int | None, typer.Option(min=2, help="How many networks to measure on each connection.")] = None,
    seeds: Annotated[tuple[int, int], typer.Option(help="Of the two networks.")] = (1, 2),
    progress: options.Progress = None,
) -> None:
    r"""Train two networks and connect them: straight and curved, with and without alignment.

    Prints one table, and writes figures, connections, numbers and a page about them into a folder. On the digits, which
    come with the package, this takes seconds. On images it trains on 10,000 examples for 10 epochs and measures 2,000,
    unless told otherwise.

    For example:

        modeconn demo

        modeconn demo --data fashion_mnist --root DIR --model tinyten \
            --epochs 20 --train-examples 60000
    """
    preset = story.DIGITS if data.data == "digits" else story.IMAGES
    arguments = parse.settings(shape.model_arg)
    plan = preset.changed(
        model=shape.model,
        arguments=arguments if shape.model else {**preset.arguments, **arguments},
        endpoints=recipe.change(preset.endpoints),
        curve=RecipeOptions(epochs=curve_epochs).change(preset.curve),
        num_points=points,
        train_examples=data.train_examples,
        test_examples=data.test_examples,
    )
    data = replace(data, train_examples=plan.train_examples, test_examples=plan.test_examples)
    loaders = data.load()
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "results.json")

    def make(seed: int) -> torch.nn.Module:
        return parse.make_model(plan.model, plan.arguments, loaders[0], seed=seed).to(data.device)

    with story.on_threads(plan.num_threads):
        found = story.tell(plan, make, *loaders, seeds=seeds, say=say, progress=bars(progress))
    story.write_results(found, out, {"data": data.data, "data_seed": data.data_seed, "seeds": seeds, **plan.to_json()})
    typer.echo(f"{plan.model} on {data.data}, {found.rows[0].profile.num_examples} test examples\n\n{found.table()}\n")
    page = report.report(report.parts_of([out]), f"modeconn demo: {plan.model} on {data.data}")
    write_text(page, out / "report.html")
    typer.echo(f"Figures (*.png), networks and connections (*.safetensors), numbers (*.json): {out.resolve()}")
    typer.echo(f"All of it on one page: {out.resolve() / 'report.html'}")
