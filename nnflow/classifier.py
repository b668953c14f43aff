"""A small classifier of the user's own images, whose penultimate layer is a feature extractor.

    f(x) = mean over positions of the last feature map, F = 128;   classes: softmax(W f + b)

The classifier-FID of arXiv 2506.03719 and of much work on MNIST, for images that Inception-V3 never saw.
On disk it is a folder: weights.safetensors, and config.json, which is written last and knows them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from nnflow.errors import CheckpointError, InputError, StoreError
from nnflow.features import FeatureExtractor
from nnflow.files import file_mark, read_json, shown
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.metrics import wilson_interval
from nnflow.store import ImageStore
from nnflow.unet import read_tensors

CONFIG, WEIGHTS = "config.json", "weights.safetensors"
KIND = "nnflow classifier"
_WIDTHS = (32, 64, 128, 128)
_LARGEST_SIDE = 64  # larger images are averaged down to this: four halvings then leave 4 x 4


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of `images` whose class is named right, with its 95 % Wilson interval."""

    fraction: float
    low: float
    high: float
    correct: int
    images: int


class Network(nn.Module):
    """Convolutions of 3 x 3, each halving the image until it is 4 to 7 pixels wide, then a linear map."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, *sides = shape
        self.sides = (min(sides[0], _LARGEST_SIDE), min(sides[1], _LARGEST_SIDE))
        layers: list[nn.Module] = []
        side = min(self.sides)
        for width in _WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if side >= 8:
                layers.append(nn.MaxPool2d(2))
                side //= 2
            channels = width
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def features(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """What the linear map is given."""
        if tuple(x.shape[2:]) != self.sides:
            x = functional.adaptive_avg_pool2d(x, self.sides)
        found: Tensor = self.trunk(x.contiguous(memory_format=torch.channels_last))
        return found.mean((2, 3))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """One number for each class."""
        found: Tensor = self.head(self.features(x))
        return found


@dataclass(frozen=True, eq=False)
class Classifier(FeatureExtractor):
    """A trained classifier; called, it gives the features.

    Attributes:
        network: in eval mode, without gradients.
        shape: (C, H, W) of the images it is for.
        classes: their names, in the order of the labels.
        trained_on: fingerprint of the images it was trained on.
        digest: of its weights.
        where: the device it is on.
    """

    network: Network
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    trained_on: str
    digest: str
    where: torch.device

    @classmethod
    def open(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> "Classifier":
        """The classifier that `train_classifier` wrote to `folder`.

        Raises:
            CheckpointError: none there, or a file is truncated, foreign, or of another training.
        """
        place = Path(folder)
        try:
            found = read_json(place / CONFIG, "the config of a classifier")
            if found.get("kind") != KIND:
                raise CheckpointError(f"{shown(place / CONFIG)}: not of an nnflow classifier")
            channels, height, width = map(int, found["shape"])
            classes, mark = tuple(map(str, found["classes"])), found["weights"]
            trained_on = str(found["images"])
            if file_mark(place / WEIGHTS) != mark:
                raise CheckpointError(
                    f"{shown(place / WEIGHTS)}: not the weights that {CONFIG} was written with; train again"
                )
            digest = str(mark["sample"])
        except StoreError as error:
            raise CheckpointError(f"{error}; name a folder that nnflow classifier wrote") from error
        except OSError as error:
            raise CheckpointError(f"{shown(place / WEIGHTS)}: {(error.strerror or '?').lower()}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{shown(place / CONFIG)}: lacks {shown(error)} of a classifier") from error
        shape = (channels, height, width)
        with torch.device("meta"):
            network = Network(shape, len(classes))
        counts = {name: t for name, t in network.state_dict().items() if not t.is_floating_point()}
        wanted = {name: t.shape for name, t in network.state_dict().items() if name not in counts}
        weights: dict[str, Tensor] = read_tensors(place / WEIGHTS, wanted)
        weights |= {name: torch.zeros((), dtype=torch.int64) for name in counts}
        network.load_state_dict(weights, assign=True)
        network = network.to(device).eval().requires_grad_(False)
        return cls(network, shape, classes, trained_on, digest, torch.device(device))

    @property
    def identity(self) -> dict[str, Any]:
        """Name, digest of the weights, fingerprint of the images trained on."""
        return {"name": "classifier", "weights": self.digest, "trained_on": self.trained_on}

    @property
    def bytes_per_image(self) -> int:
        """Before and after the first layers, in float32."""
        return 4 * 4 * _WIDTHS[0] * self.shape[1] * self.shape[2]

    @property
    def device(self) -> torch.device:
        """The one it was opened on."""
        return self.where

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of each image.

        Raises:
            InputError: images of another shape than those it was trained on.
        """
        self._check(images)
        found: Tensor = self.network.features(images)
        return found

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """One number for each class; errors as of a call."""
        self._check(images)
        found: Tensor = self.network(images)
        return found

    def _check(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.shape:
            raise InputError(
                f"images of {tuple(images.shape[1:])} (C, H, W) and a classifier of {self.shape}: "
                "train one on images of this size"
            )


def accuracy(classifier: Classifier, images: ImageStore, *, memory: int = DEFAULT_BUDGET) -> Accuracy:
    """How often `classifier` names the class of `images` right.

    Raises:
        InputError: images of other classes or another size.
    """
    if images.classes != classifier.classes:
        raise InputError(
            f"images of {len(images.classes)} classes and a classifier of {len(classifier.classes)}, or of "
            "other names: wanted the same classes"
        )
    correct = 0
    rows = rows_within(memory, classifier.bytes_per_image, at_most=1024, what="images", share=2)
    for ids in torch.arange(len(images)).split(rows):
        named = classifier.logits(images.images(ids).to(classifier.device)).argmax(1)
        correct += int((named.cpu() == images.labels[ids]).sum())
    low, high = wilson_interval(correct, len(images))
    return Accuracy(fraction=correct / len(images), low=low, high=high, correct=correct, images=len(images))
