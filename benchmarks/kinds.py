"""Compare the kinds of symmetry that discovery finds in published models with those that were worked out by hand.

    python -m benchmarks.kinds [--only TEXT] [--out table.json]

`EXPECTED` was written before the code that finds kinds, from the models' own code. Of each model it names one tensor
that lies on the residual stream, the largest kind of group that may act on it, and why it is no larger. Finding less is
a failure; finding more would be a proof that fails. Every spec is proved. The models are small configurations of what
is installed of timm and transformers (`benchmarks.published_models`); no weights are downloaded.

Four rows were of other models than those that are built, and were corrected: XGLM adds constant sinusoids, the small
OPT projects its embeddings, the smallest of timm's mixers is a gMLP, and of T5 the logits alone count. A mixer proper
is in tests/symmetry/rotating.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import modeconn
from benchmarks.published_models import NotBuiltError, Subject
from benchmarks.timing import environment

ROTATION, ROTATION_FIXING_ONES, PERMUTATION = "orthogonal", "orthogonal-ones", "permutation"

RMS = "RMS norms alone read the stream"
LAYER = "layer norms alone read the stream, and their mean keeps the ones vector"
POST = "the norm's gain acts on the stream itself (post-norm)"
TIED = "the head is the embedding, so the last gain cannot be folded"
EMBEDDING_NORM = "a norm with a gain makes the stream out of the embeddings"
PROJECTED = "in this small configuration a layer lies between the stream and the head, which is the embedding"
GATED = "the smallest of the family is a gMLP, which mixes places inside of its hidden layers alone"
SANDWICH = "a norm with a gain stands before the residual sum"
ELEMENTWISE = "a nonlinearity or batch norm acts on each channel"


@dataclass(frozen=True)
class Expected:
    """What was worked out by hand for one model.

    Args:
        model: As `Subject` names it.
        place: A pattern that matches one parameter on the stream.
        dim: Its dimension along the stream.
        kind: The largest kind of group.
        why: The reason.
        untied: The kind after ``untie=True``, where weights are tied.
        outputs: The outputs that count, where others would fix the stream.
    """

    model: str
    place: str
    dim: int
    kind: str
    why: str
    untied: str | None = None
    outputs: str | None = None


_TOKENS = "model.embed_tokens.weight"

EXPECTED = (
    Expected("transformers/llama", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/qwen2", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/qwen3", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/mistral", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/phi3", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/granite", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/glm", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/mixtral", _TOKENS, 1, ROTATION, RMS),
    Expected("transformers/olmo", _TOKENS, 1, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/stablelm", _TOKENS, 1, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/phi", _TOKENS, 1, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/gpt_neox", "*embed_in.weight", 1, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/gpt2", "*wte.weight", 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/gpt_neo", "*wte.weight", 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/mpt", "*wte.weight", 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/opt", "*decoder.embed_positions.weight", 1, ROTATION_FIXING_ONES, PROJECTED),
    Expected("transformers/xglm", _TOKENS, 1, "fixed", "sinusoids, which no weight makes, are added to it", "fixed"),
    Expected("transformers/falcon", "*word_embeddings.weight", 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/starcoder2", _TOKENS, 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/cohere", _TOKENS, 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/gemma", _TOKENS, 1, PERMUTATION, TIED, ROTATION),
    Expected("transformers/mamba", "*embeddings.weight", 1, PERMUTATION, TIED, ROTATION),
    Expected("transformers/t5", "decoder.embed_tokens.weight", 1, PERMUTATION, TIED, ROTATION, "logits"),
    Expected("transformers/whisper", "*decoder.embed_tokens.weight", 1, PERMUTATION, TIED, ROTATION_FIXING_ONES),
    Expected("transformers/gemma2", _TOKENS, 1, PERMUTATION, SANDWICH, PERMUTATION),
    Expected("transformers/olmo2", _TOKENS, 1, PERMUTATION, SANDWICH),
    Expected("transformers/bert", "*word_embeddings.weight", 1, PERMUTATION, POST, PERMUTATION),
    Expected("transformers/electra", "*position_embeddings.weight", 1, PERMUTATION, POST, PERMUTATION),
    Expected("transformers/bart", "*decoder.embed_tokens.weight", 1, PERMUTATION, POST, PERMUTATION),
    Expected("transformers/bloom", "*word_embeddings_layernorm.bias", 0, PERMUTATION, EMBEDDING_NORM, PERMUTATION),
    Expected(
        "transformers/roberta-prelayernorm", "*embeddings.LayerNorm.bias", 0, PERMUTATION, EMBEDDING_NORM, PERMUTATION
    ),
    Expected("timm/vision_transformer", "pos_embed", 2, ROTATION_FIXING_ONES, LAYER),
    Expected("timm/deit", "pos_embed", 2, ROTATION_FIXING_ONES, LAYER),
    Expected("timm/cait", "pos_embed", 2, ROTATION_FIXING_ONES, "its layer scales fold into the layers before them"),
    Expected("transformers/vit", "*cls_token", 2, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/deit", "*cls_token", 2, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/siglip", "*position_embedding.weight", 1, ROTATION_FIXING_ONES, LAYER),
    Expected("transformers/dinov2", "*cls_token", 2, ROTATION_FIXING_ONES, "its layer scales fold as well"),
    Expected("transformers/clip", "*pre_layrnorm.bias", 0, PERMUTATION, EMBEDDING_NORM),
    Expected("timm/mlp_mixer", "stem.proj.weight", 0, ROTATION_FIXING_ONES, GATED),
    Expected("timm/convnext", "stem.0.weight", 0, PERMUTATION, EMBEDDING_NORM),
    Expected("timm/resnet", "conv1.0.weight", 0, PERMUTATION, ELEMENTWISE),
    Expected("transformers/poolformer", "*patch_embeddings.0.projection.weight", 0, PERMUTATION, ELEMENTWISE),
)


def found_in(expected: Expected, *, untie: bool) -> str:
    """Return the kind that discovery finds at the place that is asked for, proved, or why there is none."""
    model, inputs = Subject(*expected.model.split("/")).build()
    spec = modeconn.discover(model, inputs, symmetries="orthogonal", untie=untie, outputs=expected.outputs)
    spec.verify(model, inputs)
    places = {place: group.kind.name for group in spec.groups for place in group.places}
    name = next(name for name in spec.state if fnmatch.fnmatchcase(name, expected.place))
    return places.get((name, expected.dim), "fixed")


def rows(only: str = "") -> list[dict[str, Any]]:
    """Return a row for each expectation: what was expected, what was found."""
    table = []
    for expected in EXPECTED:
        if only not in expected.model:
            continue
        for untie, kind in ((False, expected.kind), (True, expected.untied)):
            if kind is None:
                continue
            try:
                found = found_in(expected, untie=untie)
            except NotBuiltError as error:
                found = f"not built: {error}"
            except ValueError as error:
                found = f"failed: {error}"
            row = {"model": expected.model + " untied" * untie, "expected": kind, "found": found, "why": expected.why}
            print(f"{row['model']:40} {kind:16} {found:16} {'' if kind == found else 'DIFFERS'}", flush=True)
            table.append(row)
    return table


def main() -> None:
    """Print the table; write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name holds this")
    parser.add_argument("--out", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    table = rows(arguments.only)
    right = sum(row["expected"] == row["found"] for row in table)
    print(f"{right} of {len(table)} as expected")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"environment": environment(torch.device("cpu")), "rows": table}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
