from __future__ import annotations

import pickle

import pytest
import torch

import modeconn
from modeconn import models
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
    with pytest.raises(ValueError, match=r"should hold one state dict.* it holds 0"):
        models.load(path, CASE["mlp"].make(0))
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, path)
    with pytest.raises(ValueError, match=r"should hold one state dict.* it holds 2"):
        models.load(path, CASE["mlp"].make(0))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        models.load(path, CASE["mlp"].make(0))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        models.load(tmp_path / "nowhere")
