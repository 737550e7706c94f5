from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeconn import models
from modeconn.network.loss import cross_entropy

IMAGE_MODELS = [name for name in models.names() if name != "mlp"]
MLP_ARGUMENTS = {"num_inputs": 12, "hidden": [8, 7], "num_classes": 5}


def small(name: str, **arguments):
    """The model on the smallest images that it takes without stretching a test."""
    if name == "mlp":
        return models.mlp(**MLP_ARGUMENTS, **arguments)
    image_size = 32 if name.startswith("vgg") else 16
    return models.build(name, num_classes=5, image_size=image_size, **arguments)


@pytest.mark.parametrize(
    ("name", "num_parameters", "mega_macs"),
    [("tinyten", 92_628, 11.4), ("resnet32", 472_756, 69.1), ("googlenet", 10_237_388, 571.6)],
)
def test_sizes_are_those_of_the_paper_at_100_classes(name, num_parameters, mega_macs):
    model = models.build(name, num_classes=100).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(model.example_input()[:1])
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert counter.get_total_flops() / 2e6 == pytest.approx(mega_macs, abs=0.05)


@pytest.mark.parametrize(
    "name", ["resnet20", "resnet32", "preresnet110", "preresnet164", "vgg11", "vgg16", "vgg19", "vgg16_bn"]
)
def test_the_number_in_a_name_counts_the_layers_off_the_shortcuts(name):
    with torch.device("meta"):
        model = models.build(name)
    layers = [key for key, module in model.named_modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))]
    depth = int(name.removesuffix("_bn").lstrip("abcdefghijklmnopqrstuvwxyz"))
    assert sum("shortcut" not in key for key in layers) == depth


def test_wide_resnet_has_the_published_size():
    with torch.device("meta"):
        model = models.wideresnet28x10()
    assert sum(parameter.numel() for parameter in model.parameters()) == 36_489_290


@pytest.mark.parametrize("name", models.names())
def test_forward_and_backward_reach_every_parameter_in_both_modes(name):
    model = small(name)
    x, targets = model.example_input(), torch.tensor([0, 4])
    assert x.shape == (2, *model.input_shape) and x.min() == 0 and x.max() == 1

    with torch.no_grad():
        assert model.eval()(x).shape == (2, 5)
    loss = cross_entropy(model.train()(x), targets)
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", models.names())
def test_logits_alone_reach_inputs_and_every_parameter_but_auxiliary_heads(name):
    model = small(name).eval()
    x = model.example_input().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    without = {key for key, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {key for key, _ in model.named_parameters() if key.startswith("auxiliary")}


def test_googlenet_returns_its_auxiliary_logits_in_train_mode_alone():
    model = small("googlenet")
    with torch.no_grad():
        outputs = model.train()(model.example_input())
        assert isinstance(model.eval()(model.example_input()), torch.Tensor)
    assert [tuple(output.shape) for output in outputs] == [(2, 5)] * 3


@pytest.mark.parametrize("name", models.names())
def test_the_seed_alone_decides_the_initial_weights(name):
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state()
        first = small(name, seed=3).state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(100)
        again = small(name, seed=3).state_dict()
    other = small(name, seed=4).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", models.names())
def test_a_model_is_rebuilt_from_its_description(name):
    model = copy.deepcopy(small(name, seed=5, mean=0.25))
    description = models.describe(model)
    assert description == tuple(json.loads(json.dumps(description)))
    assert description[0] == name and "seed" not in description[1]

    state, rebuilt = model.state_dict(), models.build(description[0], **description[1]).state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in rebuilt.items()}
    assert torch.equal(state["normalize.mean"], rebuilt["normalize.mean"])


def test_descriptions_keep_tensors_as_exact_numbers():
    mean = torch.rand(12, generator=torch.Generator().manual_seed(0))
    model = models.mlp(**MLP_ARGUMENTS, mean=mean)
    name, arguments = json.loads(json.dumps(models.describe(model)))
    assert torch.equal(models.build(name, **arguments).normalize.mean, mean)


def test_endpoints_that_differ_in_their_seed_have_equal_descriptions():
    assert models.describe(small("tinyten", seed=1)) == models.describe(small("tinyten", seed=2))


def test_a_description_does_not_share_state_with_the_model():
    model = small("tinyten")
    models.describe(model)[1]["num_classes"] = 99
    assert models.describe(model)[1]["num_classes"] == 5


def test_a_model_from_elsewhere_has_no_description():
    assert models.describe(torch.nn.Linear(2, 2)) is None


def test_names_lists_every_factory_once():
    assert set(models.names()) <= set(models.__all__)
    assert len(models.names()) == len(set(models.names())) == 15


@pytest.mark.parametrize("name", models.names())
def test_outputs_follow_the_dtype_of_the_model(name):
    model = small(name).double().eval()
    x = model.example_input()
    assert x.dtype == torch.float64
    with torch.no_grad():
        assert model(x).dtype == torch.float64


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_images_of_one_channel_and_another_size_fit(name):
    image_size = 64 if name in ("conv_fc", "vgg11") else 32
    with torch.device("meta"):
        model = models.build(name, num_classes=7, in_channels=1, image_size=image_size).eval()
    assert model.example_input().shape == (2, 1, image_size, image_size)
    assert model(model.example_input()).shape == (2, 7)


@pytest.mark.parametrize("name", ["conv_fc", "tinyten", "resnet20", "resnet32", "googlenet"])
def test_fashion_mnist_images_fit_as_they_are(name):
    model = models.build(name, in_channels=1, image_size=28).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("width", [0.5, 1, 3])
def test_width_scales_the_channels(width):
    model = models.resnet20(width=width)
    assert model.stem[0].out_channels == 16 * width
    assert model.classifier.in_features == 64 * width


@pytest.mark.parametrize("width", [0.25, 1])
def test_width_scales_all_layers_of_conv_fc(width):
    model = models.conv_fc(width=width)
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    assert [len(weight) for weight in weights] == [width * units for units in (32, 64, 128, 1000, 1000)] + [10]


def test_the_first_layer_normalises_pixels():
    model = models.mlp(2, (), 2, mean=[0.0, 0.5], std=[2.0, 0.25])
    torch.testing.assert_close(model.normalize(torch.tensor([[1.0, 1.0]])), torch.tensor([[0.5, 2.0]]))


def test_default_normalisation_of_colour_images_is_that_of_cifar10():
    normalize = models.Normalize(3)
    pixels = torch.tensor([0.4914, 0.4822, 0.4465]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels), torch.zeros(1, 3, 1, 1))
    torch.testing.assert_close(normalize(torch.ones(1, 3, 1, 1)).flatten()[0], torch.tensor((1 - 0.4914) / 0.247))


def test_three_features_are_no_colours():
    normalize = models.mlp(3, (4,), 2).normalize
    assert normalize.mean.tolist() == [0.5] * 3 and normalize.std.tolist() == [0.25] * 3


def test_normalisation_is_saved_but_not_trained():
    model = small("tinyten", mean=0.1, std=0.2)
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())
    assert not any(name.startswith("normalize") for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": [0.1, 0.2]}, r"mean must be one number or one for each of the 3 channels, got shape \(2,\)"),
        ({"std": 0.0}, r"std must be positive for every channel, got a smallest value of 0"),
        ({"mean": float("nan")}, "mean must be a number, or a list .* got mean=nan"),
    ],
)
def test_statistics_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.tinyten(**arguments)


@pytest.mark.parametrize(
    ("name", "smallest", "shown"), [("tinyten", 9, "TinyTen"), ("conv_fc", 15, "ConvFC"), ("vgg11", 32, "VGG")]
)
def test_too_small_images_are_refused_and_the_smallest_works(name, smallest, shown):
    with torch.device("meta"):
        model = models.build(name, image_size=smallest).eval()
        assert model(model.example_input()).shape == (2, 10)
        with pytest.raises(ValueError, match=f"image_size must be at least {smallest} for {shown}, got {smallest - 1}"):
            models.build(name, image_size=smallest - 1)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="in_channels must be at least 1, got in_channels=0"):
        models.resnet20(in_channels=0)
    with pytest.raises(ValueError, match=r"width must leave at least 1 of the stem's 16 channels, got width=0"):
        models.resnet20(width=0)
    with pytest.raises(ValueError, match=r"width must leave at least 1 of the first convolution's 32 .*, got width=0"):
        models.conv_fc(width=0)


def test_an_unknown_name_is_answered_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"the zoo has no model 'resnet21'; it has conv_fc, .*wideresnet28x10"):
        models.build("resnet21")


def test_an_unknown_argument_is_named():
    with pytest.raises(ValueError, match=r"model 'tinyten' cannot be made from .*unexpected keyword argument 'depth'"):
        models.build("tinyten", depth=3)
