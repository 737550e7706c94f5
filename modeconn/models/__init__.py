"""Networks to connect: plain modules, written once, each with its normalisation as first layer.

Every factory takes ``seed=`` (the initial weights) and returns a module with ``example_input()``; image networks also
take ``in_channels=`` and ``image_size=``. `train` makes an endpoint of one, `save` and `load` keep it. The rest of the
package never asks where a module comes from: your own networks do as well.
"""

from modeconn.models.conv_fc import conv_fc
from modeconn.models.files import load, save
from modeconn.models.googlenet import googlenet
from modeconn.models.mlp import mlp
from modeconn.models.population import train_population
from modeconn.models.preresnet import preresnet110, preresnet164, wideresnet28x10
from modeconn.models.resnet import resnet20, resnet32
from modeconn.models.tinyten import tinyten
from modeconn.models.training import DIGITS_RECIPE, train, train_snapshots
from modeconn.models.vgg import vgg11, vgg11_bn, vgg16, vgg16_bn, vgg19, vgg19_bn
from modeconn.models.zoo import Normalize
from modeconn.network.registry import build, describe, names

__all__ = [
    "DIGITS_RECIPE",
    "Normalize",
    "build",
    "conv_fc",
    "describe",
    "googlenet",
    "load",
    "mlp",
    "names",
    "preresnet110",
    "preresnet164",
    "resnet20",
    "resnet32",
    "save",
    "tinyten",
    "train",
    "train_population",
    "train_snapshots",
    "vgg11",
    "vgg11_bn",
    "vgg16",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
    "wideresnet28x10",
]
