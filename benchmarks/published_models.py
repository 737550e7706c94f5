"""Published models in small configurations: of whatever of torchvision, timm and transformers is installed."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

LIBRARIES = ("torchvision", "timm", "transformers")
LARGEST = 40_000_000
"""Parameters of the largest model that is tried."""


_Variants = Iterator[tuple[nn.Module, Iterator[Any]]]
"""One model in several configurations, the smallest first, each with inputs that it may run on."""


class NotBuiltError(Exception):
    """A model that the trial cannot build, or has no inputs for: it says nothing of modeconn."""


@dataclass(frozen=True)
class Subject:
    """One published model.

    Args:
        origin: The library that it is from.
        name: What the library calls it.
    """

    origin: str
    name: str

    def __str__(self) -> str:
        return f"{self.origin}/{self.name}"

    def build(self) -> tuple[nn.Module, Any]:
        """Return the model with weights as its library draws them, and inputs that it runs on.

        Raises:
            NotBuiltError: If it cannot be built, or runs on none of the inputs that the trial knows.
        """
        torch.manual_seed(0)
        failures: list[str] = []
        variants = _BUILDERS[self.origin](self.name)
        while True:
            try:
                model, candidates = next(variants)
            except StopIteration:
                break
            except Exception as error:
                failures.append(f"not built: {_in_short(error)}")
                break
            if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
                failures.append("too large")
                continue
            for inputs in candidates:
                try:
                    for training in (True, False):
                        call(model.train(training), inputs)
                except Exception as error:
                    failures.append(f"runs on no inputs of the trial: {_in_short(error)}")
                    continue
                return model, inputs
        raise NotBuiltError(failures[0] if failures else "there is none")


def subjects() -> Iterator[Subject]:
    """Yield every model of the libraries that are installed: of timm, a small one of each family."""
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is not None:
            yield from (Subject(library, name) for name in _NAMES[library]())


def call(model: nn.Module, inputs: Any) -> Any:
    """Run a model on inputs as `modeconn.discover` takes them, without gradients."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _in_short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


def _images(*sizes: int, channels: int = 3) -> Iterator[torch.Tensor]:
    for size in sizes:
        yield torch.rand(2, channels, size, size)


# ---------------------------------------------------------------- torchvision


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [name for name in models.list_models() if not name.startswith("quantized_")]


def _torchvision(name: str) -> _Variants:
    from torchvision import models

    has_backbone = models.get_model_weights(name).__module__.partition("torchvision.models.")[2]
    settings: dict[str, Any] = {"weights": None}
    if has_backbone.startswith(("detection", "segmentation")):
        settings["weights_backbone"] = None
    model = models.get_model(name, **settings)
    if has_backbone.startswith("detection"):
        yield model, _with_targets()
    elif has_backbone.startswith("video"):
        yield model, (torch.rand(2, 3, frames, size, size) for frames, size in ((8, 64), (16, 112), (16, 224)))
    elif has_backbone.startswith("optical_flow"):
        yield model, ((torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128)) for _ in range(1))
    else:
        yield model, _images(64, 128, 224)


def _with_targets() -> Iterator[Any]:
    """Yield images of a detector, with the boxes that it is trained on."""
    boxes = {"boxes": torch.tensor([[4.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    masks = {"masks": torch.ones(1, 64, 64, dtype=torch.uint8), "keypoints": torch.rand(1, 17, 3) * 30}
    yield ([torch.rand(3, 64, 64)], [boxes])
    yield ([torch.rand(3, 64, 64)], [boxes | masks])


# ---------------------------------------------------------------- timm


def _timm_names() -> list[str]:
    """Return the families: the modules that have models."""
    import timm

    return [module for module in timm.list_modules() if timm.list_models(module=module)]


def _guessed_size(name: str) -> tuple[int, str]:
    """Return a key by which the names of small models come first."""
    order = [
        "test",
        "pico",
        "femto",
        "atto",
        "zepto",
        "nano",
        "tiny",
        "xxs",
        "_xs",
        "small",
        "_s",
        "_t",
        "mini",
        "base",
    ]
    return next((i for i, word in enumerate(order) if word in name), len(order)), name


def _timm(family: str) -> _Variants:
    import timm

    for name in sorted(timm.list_models(module=family), key=_guessed_size)[:6]:
        model = timm.create_model(name, pretrained=False, num_classes=7)
        channels, size, _ = model.default_cfg.get("input_size", (3, 224, 224))
        yield model, _images(*sorted({64, 128, size}), channels=channels)


# ---------------------------------------------------------------- transformers

_SIZES = {
    32: "hidden_size d_model n_embd dim embed_dim embedding_size hidden_dim projection_dim image_size",
    48: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner moe_intermediate_size dim_feedforward "
    "shared_expert_intermediate_size d_inner ffn_hidden_size decoder_intermediate_size",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers depth layers "
    "num_encoder_layers num_key_value_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts attention_heads decoder_num_attention_heads",
    8: "head_dim d_kv patch_size qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank d_head",
    16: "qk_rope_head_dim rotary_dim state_size",
    99: "vocab_size",
    64: "max_position_embeddings n_positions max_target_positions max_source_positions",
}
"""Small values of a configuration's numbers, by what they are called."""
_CLASSES = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", "")
"""Which class of a model is tried: the first one that there is; "" for the bare model."""


def _transformers_names() -> list[str]:
    from transformers.models.auto import modeling_auto

    mappings = [
        getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES")
        for kind in _CLASSES
    ]
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _transformers(name: str) -> _Variants:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[name]
    for keep in ((), _OF_HEADS, _WIDTHS):
        config = config_class()
        try:
            _shrink(config, keep)
            model = _class_of(config_class)(config)
        except Exception:
            if keep == _WIDTHS:
                raise
            continue
        yield model, _inputs_of(model, config)


def _class_of(config_class: type) -> Any:
    """Return the class of model that is tried for a configuration, None if there is none."""
    from transformers.models.auto import modeling_auto

    for kind in _CLASSES:
        mapping = getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING" if kind else "MODEL_MAPPING", {})
        if config_class in mapping:
            found = mapping[config_class]
            return found[0] if isinstance(found, (tuple, list)) else found
    return None


def _shrink(config: Any, keep: tuple[str, ...], depth: int = 0) -> None:
    """Set what makes a model large to small values, in the parts of a configuration too, but for some names."""
    small = {name: value for value, names in _SIZES.items() for name in names.split() if name not in keep}
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and depth < 3:
            _shrink(value, keep, depth + 1)
        elif name in small and type(value) is int:
            _set(config, name, min(value, small[name]))
        elif name == "layer_types" and isinstance(value, list):
            _set(config, name, _both_kinds(value))
        else:
            _calm(config, name, value)


_OF_HEADS = (
    "head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "rotary_dim",
    "d_kv",
    "d_head",
    "kv_lora_rank",
)
"""What other numbers, which have no name here, may have to fit."""
_WIDTHS = tuple(name for value, names in _SIZES.items() if value not in (2, 99) for name in names.split())
"""All but depth and vocabulary."""


def _both_kinds(kinds: list[str]) -> list[str]:
    """Return two layers of the kinds that a configuration mixes."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * 2)[:2]


def _calm(config: Any, name: str, value: Any) -> None:
    """Switch off what is random, and keep the numbers of special tokens within the vocabulary."""
    if isinstance(value, float) and "drop" in name:
        _set(config, name, 0.0)
    elif name.endswith("token_id") and type(value) is int and value > 98:
        _set(config, name, 90 + sum(map(ord, name)) % 8)


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property without a setter
        return


def _inputs_of(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Yield keyword inputs to try: text, images, sound, and pairs of them."""
    draw = random.Random(0)
    tokens = torch.tensor([[draw.randrange(5, 85) for _ in range(9)] for _ in range(2)])
    text = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    yield {"input_ids": tokens}
    yield text | {"decoder_input_ids": tokens[:, :6].clone()}
    part = getattr(config, "vision_config", config)
    size, channels = getattr(part, "image_size", 32), getattr(part, "num_channels", 3)
    sizes = [size] if isinstance(size, int) else []
    for side in [*sizes, 32, 64, 128, 224]:
        image = {"pixel_values": torch.rand(2, channels if isinstance(channels, int) else 3, side, side)}
        yield image
        yield text | image
    bins = getattr(config, "num_mel_bins", 80)
    positions = getattr(config, "max_source_positions", 64)
    yield {"input_values": torch.randn(2, 4000)}
    sound = {"input_features": torch.randn(2, bins, 2 * positions)}
    yield sound | {"decoder_input_ids": tokens[:, :6].clone()}
    yield sound
    yield {"input_features": torch.randn(2, 2 * positions, bins)}
    yield {"pixel_values_videos": torch.rand(2, 4, 3, 32, 32)}
    yield {"pixel_values": torch.rand(2, getattr(config, "num_frames", 4), 3, 32, 32)}


_NAMES: dict[str, Callable[[], list[str]]] = {
    "torchvision": _torchvision_names,
    "timm": _timm_names,
    "transformers": _transformers_names,
}
_BUILDERS: dict[str, Callable[[str], _Variants]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
