"""Networks trained per second: a population in one vectorised run against one after another.

    python benchmarks/population.py [--networks 300] [--rounds 3]

MLPs 64-32-32-32-10 on the digits with models.DIGITS_RECIPE, cut to --epochs; the networks of the other way are fewer.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from timing import environment, interleaved, ratio

from modeconn import data, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--alone", type=int, default=10, help="networks of the other way")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    train, _ = data.load("digits")
    recipe = replace(models.DIGITS_RECIPE, epochs=args.epochs)
    networks = [
        models.mlp(64, (32, 32, 32), 10, mean=train.mean(), std=train.std() + 0.1, seed=seed)
        for seed in range(args.networks)
    ]

    def together() -> None:
        models.train_population(networks, train, recipe=recipe)

    def alone() -> None:
        for seed, network in enumerate(networks[: args.alone]):
            models.train(network, train, recipe=recipe, seed=seed)

    seconds = interleaved({"together": together, "alone": alone}, args.rounds, torch.device("cpu"))
    each = {
        name: [s / count for s in seconds[name]] for name, count in (("together", args.networks), ("alone", args.alone))
    }
    share = args.epochs / models.DIGITS_RECIPE.epochs
    print(f"{args.networks} networks together, {args.alone} alone; {environment(torch.device('cpu'))}")
    for name, values in each.items():
        print(f"{name:>9}: {share / min(values):.2f} networks a second, at {models.DIGITS_RECIPE.epochs} epochs each")
    print(f"    ratio of seconds, together to alone: {ratio(each['together'], each['alone'])}")


if __name__ == "__main__":
    main()
