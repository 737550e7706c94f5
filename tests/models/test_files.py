from __future__ import annotations

import argparse
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import modeconn
from modeconn import models
from modeconn.tools import files
from tests.cases import CASE, CASES, same_bits


def lively(model):
    """Give every buffer a value that no new model has."""
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model", [models.mlp(6, [5, 4], 3, mean=[0.5] * 6), models.tinyten(7, in_channels=1)])
def test_a_model_of_the_zoo_is_rebuilt_from_its_file_alone(tmp_path, model, dtype):
    model = lively(model).to(dtype).train()
    models.save(model, tmp_path / "m.safetensors")
    loaded = models.load(tmp_path / "m.safetensors")
    assert same_bits(loaded, model) and not loaded.training and model.training
    assert models.describe(loaded) == models.describe(model)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_other_model_takes_a_template_which_is_left_alone(tmp_path, case):
    model, template = case.make(0), case.make(1)
    models.save(model, tmp_path / "m")
    loaded = models.load(tmp_path / "m", template)
    assert same_bits(loaded, model) and not same_bits(template, model)


def test_a_relabelled_model_keeps_its_description(tmp_path):
    a, b = models.mlp(6, [5], 3, seed=0), models.mlp(6, [5], 3, seed=1)
    relabelled = modeconn.align(a, b).model_b
    models.save(relabelled, tmp_path / "m")
    assert same_bits(models.load(tmp_path / "m"), relabelled)


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"epoch": 3, "model_state": s, "optimizer_state": {"step": 1}}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_of_torch_save_is_read_into_a_template(tmp_path, wrap, zipped):
    model = CASE["residual"].make(0)
    torch.save(wrap(model.state_dict()), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert same_bits(models.load(tmp_path / "m.pt", CASE["residual"].make(1)), model)


class Trap:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys, write):
    write({"weight": Trap()}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m\.pt' is damaged, or holds more than tensors .* torch\.save\(model\.state"):
        models.load(tmp_path / "m.pt", CASE["mlp"].make(0))
    assert capsys.readouterr().out == ""


def test_a_header_whose_length_looks_like_a_pickle_is_no_pickle(tmp_path):
    path = tmp_path / "m"
    for length in range(1, 640):
        model = torch.nn.Module()
        model.register_buffer("x" * length, torch.arange(3.0))
        models.save(model, path)
        if path.read_bytes().startswith(b"\x80\x02"):  # the header has 0x0280 bytes
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    assert same_bits(models.load(path, model), model)


def test_what_does_not_fit_is_named(tmp_path):
    path = tmp_path / "m"
    models.save(CASE["mlp"].make(0), path)
    with pytest.raises(ValueError, match=r"m' does not say how to build its model\. Pass template="):
        models.load(path)
    with pytest.raises(ValueError, match=r"another architecture: '1\.weight' is \(8, 8\) in the file, \(16, 8\) in th"):
        models.load(path, CASE["dropout"].make(0))
    torch.save({}, path)
    with pytest.raises(ValueError, match=r"should hold a state dict.* it holds none"):
        models.load(path, CASE["mlp"].make(0))
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, path)
    with pytest.raises(
        ValueError, match=r"\(its entry 'a'\) is of another architecture: .*which fit less: 'b'"
    ) as caught:
        models.load(path, CASE["mlp"].make(0))
    missing = [
        name for name in CASE["mlp"].make(0).state_dict() if f"{name!r} is missing in the file" in str(caught.value)
    ]
    assert missing == list(CASE["mlp"].make(0).state_dict())
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        models.load(path, CASE["mlp"].make(0))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load(tmp_path / "nowhere")


def wrapped(state: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": value for name, value in state.items()}


FOREIGN = {
    "DataParallel": lambda m: nn.DataParallel(m).state_dict(),
    "torch.compile": lambda m: wrapped(m.state_dict(), "_orig_mod."),
    "a compiled part": lambda m: {name.replace("1.", "1._orig_mod."): x for name, x in m.state_dict().items()},
    "Lightning": lambda m: {
        "state_dict": {**wrapped(m.state_dict(), "model."), "accuracy.total": torch.tensor(3)}, "epoch": 3,
    },
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m).state_dict(),
    "averaged, compiled, in parallel": lambda m: wrapped(
        torch.optim.swa_utils.AveragedModel(m).state_dict(), "module._orig_mod."
    ),
    "among other things": lambda m: {
        "model": m.state_dict(),
        "optimizer": torch.optim.Adam(m.parameters()).state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("somewhere")),
        "best": np.float64(0.9),
        "epoch": np.int64(3),
        "history": [0.1, 0.2],
    },
    "deeper": lambda m: {"networks": {"student": {"weights": m.state_dict()}}},
    "beside another": lambda m: {"head": {"w": torch.ones(3)}, "backbone": m.state_dict()},
    "counters missing": lambda m: {n: x for n, x in m.state_dict().items() if not n.endswith("num_batches_tracked")},
    "half precision": lambda m: {n: x.half() if x.is_floating_point() else x for n, x in m.state_dict().items()},
}  # fmt: skip


def holds_tensors_alone(name: str) -> bool:
    """Whether a state can be kept in a safetensors file."""
    state = FOREIGN[name](CASE["batch_norm"].make(1))
    return all(isinstance(value, torch.Tensor) for value in state.values())


WAYS = [(name, "pt") for name in FOREIGN] + [(name, "safetensors") for name in FOREIGN if holds_tensors_alone(name)]


@pytest.mark.parametrize(("name", "suffix"), WAYS)
@pytest.mark.filterwarnings("ignore:.*holds more than the model")
def test_states_as_people_keep_them_are_read(tmp_path, name, suffix):
    model = CASE["batch_norm"].make(1)
    state = FOREIGN[name](copy.deepcopy(model))
    if suffix == "safetensors":
        safetensors.torch.save_file({name: x.clone() for name, x in state.items()}, tmp_path / "m")
    else:
        torch.save(state, tmp_path / "m")
    found = models.load(tmp_path / "m", CASE["batch_norm"].make(0))
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)


def test_one_of_several_states_is_chosen_by_name(tmp_path):
    raw, averaged = CASE["mlp"].make(1), CASE["mlp"].make(2)
    torch.save({"model": raw.state_dict(), "ema": {"module": averaged.state_dict()}}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"several state dicts of this architecture: 'ema\.module', 'model'.*entry="):
        models.load(tmp_path / "m", raw)
    assert same_bits(models.load(tmp_path / "m", raw, entry="ema.module"), averaged)
    assert same_bits(models.load(tmp_path / "m", raw, entry="model"), raw)
    with pytest.raises(ValueError, match=r"has no entry 'student'; its state dicts are 'ema\.module', 'model'"):
        models.load(tmp_path / "m", raw, entry="student")


def test_what_is_left_out_is_told(tmp_path):
    model = CASE["mlp"].make(1)
    torch.save({**wrapped(model.state_dict(), "net."), "teacher.weight": torch.ones(3)}, tmp_path / "m")
    with pytest.warns(UserWarning, match="holds more than the model: 'teacher.weight' were left out"):
        assert same_bits(models.load(tmp_path / "m", CASE["mlp"].make(0)), model)


def test_extra_state_comes_back(tmp_path):
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    model = Counting(2, 2)
    model.seen = 7
    torch.save(model.state_dict(), tmp_path / "m")
    assert models.load(tmp_path / "m", Counting(2, 2)).seen == 7


def test_numbers_that_are_not_finite_and_other_kinds_of_numbers_are_refused(tmp_path):
    model = CASE["mlp"].make(1)
    state = model.state_dict()
    torch.save({**state, "1.weight": state["1.weight"].long()}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"'1\.weight' is torch\.int64 in the file, torch\.float32 in the model"):
        models.load(tmp_path / "m", model)
    torch.save({**state, "1.weight": state["1.weight"] * torch.nan}, tmp_path / "m")
    with pytest.raises(ValueError, match=r"m' holds numbers that are not finite, in '1\.weight'"):
        models.load(tmp_path / "m", model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_what_is_saved_can_be_loaded_so_a_network_whose_training_failed_is_not_saved(tmp_path, dtype):
    model = CASE["mlp"].make(1).to(dtype)
    models.save(model, tmp_path / "m")
    assert torch.equal(models.load(tmp_path / "m", model).state_dict()["1.weight"].float(), model[1].weight.float())
    with torch.no_grad():
        model[1].weight[0, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^'1\.weight' of the model holds numbers that are not finite.*torch\.save"):
        models.save(model, tmp_path / "n")
    with pytest.raises(ValueError, match=r"'1\.weight' of the model is on the device 'meta', without values"):
        models.save(model.to("meta"), tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_file_whose_tensors_or_description_were_changed_is_refused(tmp_path):
    models.save(models.mlp(4, (8,), 3, seed=1), tmp_path / "m")
    content = (tmp_path / "m").read_bytes()
    for place in (content.index(b"mlp"), len(content) - 1, len(content) // 2 * 4 // 4):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "m").write_bytes(changed)
        with pytest.raises(ValueError, match=r"m' is (damaged|truncated)"):
            models.load(tmp_path / "m")


def test_a_description_that_would_take_all_memory_is_refused_at_once(tmp_path):
    huge = ["mlp", {"num_inputs": 10**9, "hidden": [10**9], "num_classes": 2, "mean": 0.5, "std": 0.25}]
    files.write(tmp_path / "m", "model", {"layers.0.weight": torch.ones(2, 2)}, {"format": 1, "model": huge})
    with pytest.raises(ValueError, match="m' is damaged"):
        models.load(tmp_path / "m")
