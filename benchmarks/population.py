"""Networks trained per second: a population in one vectorised run against one after another.

    python benchmarks/population.py [--networks 300] [--rounds 3]

MLPs 64-32-32-32-10 on the digits with models.DIGITS_RECIPE, cut to --epochs; the networks of the other way are fewer.
"""

from __future__ import annotations

from dataclasses import replace

from timing import Report, interleaved, options_of

from modeconn import data, models


def main() -> None:
    parser = options_of(__doc__, rounds=3)
    parser.add_argument("--networks", type=int, default=300)
    parser.add_argument("--alone", type=int, default=10, help="networks of the other way")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    report = Report(args)
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

    seconds = interleaved({"together": together, "alone": alone}, args.rounds)
    counts = {"together": args.networks, "alone": args.alone}
    each = {f"a network, {name}": [s / count for s in seconds[name]] for name, count in counts.items()}
    about = f"{args.networks} networks together, {args.alone} alone, {args.epochs} epochs"
    report.add(about, each, [tuple(each)])
    report.write()


if __name__ == "__main__":
    main()
