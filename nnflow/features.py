"""What sets of images are compared by: a function of one image that gives F numbers.

    f: (B, C, H, W) in [-1, 1]  ->  (B, F)

Pixels, PCA coordinates, and any network in a TorchScript file; `classifier` adds one that nnflow
trains. Images are rounded to the 8 bits they are stored in before they are compared: a sample's
finer shades would tell it apart from any stored image.
"""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nnflow.embedding import Embedding, embedding_digest
from nnflow.errors import InputError, StoreError
from nnflow.files import shown
from nnflow.imageset import ImageSet, take
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.store import to_float, to_uint8

COORDINATES = 128  # 95 % of the variance of CIFAR-10
_MOST_ROWS = 1024  # of a block: more is no faster on a CPU
# Bytes of one image within a network whose insides are unknown: Inception-V3 at 299 x 299 holds 5.5 MB
# in its largest map, a few of them at once. On the safe side, not a measurement.
_SCRIPTED_BYTES = 64 << 20


class FeatureExtractor(ABC):
    """Images in [-1, 1] to F numbers each, row by row, the same every time."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What JSON keeps of it: a `name`, and whatever tells it apart from others of that name."""

    @property
    @abstractmethod
    def bytes_per_image(self) -> int:
        """Working memory that a call takes for each image, roughly."""

    @property
    def device(self) -> torch.device:
        """Where images are to be when it is called."""
        return torch.device("cpu")

    @abstractmethod
    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Features of each image."""


@dataclass(frozen=True)
class Pixels(FeatureExtractor):
    """The pixels as they are, F = C*H*W, of images of `shape` (C, H, W)."""

    shape: tuple[int, int, int]

    @property
    def identity(self) -> dict[str, Any]:
        """Its name."""
        return {"name": "pixels"}

    @property
    def bytes_per_image(self) -> int:
        """The image in float32 and twice in float64."""
        return 20 * math.prod(self.shape)

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """The values of each image in one row."""
        return images.flatten(1)


@dataclass(frozen=True, eq=False)
class PrincipalCoordinates(FeatureExtractor):
    """The leading principal coordinates of an index: a rotation of the pixels, cut off.

    With all of them every distance of features is that of the pixels; with the leading ones, of the
    images' coarse part.

    Attributes:
        embedding: of the training images.
        coordinates: F.
    """

    embedding: Embedding
    coordinates: int

    @classmethod
    def leading(cls, embedding: Embedding, coordinates: int | None = None) -> "PrincipalCoordinates":
        """The first `coordinates`; by default 128, or all where the embedding keeps fewer.

        Raises:
            InputError: more than the embedding keeps, or none.
        """
        kept = len(embedding.principal)
        wanted = min(COORDINATES, kept) if coordinates is None else coordinates
        if not 1 <= wanted <= kept:
            raise InputError(f"{wanted} PCA coordinates: wanted 1 to the {kept} that the index keeps")
        return cls(embedding, wanted)

    @property
    def identity(self) -> dict[str, Any]:
        """Name, how many, and which embedding's."""
        return {
            "name": "pca",
            "coordinates": self.coordinates,
            "embedding": embedding_digest(self.embedding),
        }

    @property
    def bytes_per_image(self) -> int:
        """The image twice in float32, its coordinates."""
        return 8 * len(self.embedding.mean) + 20 * self.coordinates

    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """Coordinates of each image, in [-1, 1] units of the pixels.

        Raises:
            InputError: images of another size than those of the index.
        """
        flat = images.flatten(1)
        if flat.shape[1] != len(self.embedding.mean):
            raise InputError(
                f"images of {flat.shape[1]} values and an embedding of {len(self.embedding.mean)}: "
                "take the embedding of an index of such images"
            )
        return (flat - self.embedding.mean) @ self.embedding.principal[: self.coordinates].T


@dataclass(frozen=True, eq=False)
class Scripted(FeatureExtractor):
    """A network in a TorchScript file, such as Inception-V3 or DINOv2, from weights that you have.

    What the file must hold: a module whose `forward` takes float32 (B, 3, H, W), **whole numbers 0 to
    255**, red, green and blue, at the images' own size, any B; and returns floats (B, F). It resizes and
    normalises by itself. Grey images reach it with their channel three times. Where `forward` has an
    argument `return_features`, it is passed as True: so NVIDIA's inception-2015-12-05.pt, the network of
    FID, is taken as published. Any other network becomes such a file where its own package is installed:

        class Features(torch.nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net
                self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1))
                self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1))

            def forward(self, x):
                x = torch.nn.functional.interpolate(x / 255, (224, 224), mode="bicubic", antialias=True)
                return self.net((x - self.mean) / self.std)

        net = torch.hub.load("facebookresearch/dinov2", "dinov2_vits14").eval()
        torch.jit.trace(Features(net), torch.zeros(2, 3, 32, 32)).save("dinov2_vits14.pt")

    Open only files that you trust: a script is a program.

    Attributes:
        path: of the file.
        digest: of its bytes.
        module: what it holds.
        where: the device it is on.
    """

    path: Path
    digest: str
    module: Any
    where: torch.device

    @classmethod
    def open(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "Scripted":
        """The network in the file at `path`.

        Raises:
            StoreError: absent, or not TorchScript.
        """
        place = Path(path)
        try:
            with place.open("rb") as file:
                digest = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
            with warnings.catch_warnings():
                # torch 2.13 would have files of torch.export, which cannot yet say "any B" for all networks
                warnings.simplefilter("ignore", DeprecationWarning)
                module: Any = torch.jit.load(place, map_location=device).eval()
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            raise StoreError(f"{shown(place)}: {cause}; wanted a TorchScript file") from error
        except (RuntimeError, ValueError) as error:
            raise StoreError(
                f"{shown(place)}: not TorchScript ({_first_line(error)}); wanted what torch.jit.save wrote"
            ) from error
        return cls(place, digest, module, torch.device(device))

    @property
    def identity(self) -> dict[str, Any]:
        """Name, the file's own name and a digest of its bytes."""
        return {"name": "torchscript", "file": shown(self.path.name), "digest": self.digest}

    @property
    def bytes_per_image(self) -> int:
        """A guess on the safe side."""
        return _SCRIPTED_BYTES

    @property
    def device(self) -> torch.device:
        """The one it was opened on."""
        return self.where

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B F"]:
        """What the network makes of each image.

        Raises:
            InputError: images of 2 or more than 3 channels, or the network fails on them or answers in
                another shape.
        """
        channels = images.shape[1]
        if channels not in (1, 3):
            raise InputError(f"images of {channels} channels: {shown(self.path.name)} is for 1 (grey) or 3")
        x = to_uint8(images).to(self.where).float().expand(-1, 3, -1, -1)
        takes = [argument.name for argument in self.module.forward.schema.arguments]
        flags = {"return_features": True} if "return_features" in takes else {}
        try:
            found = self.module(x, **flags)
        except RuntimeError as error:
            raise InputError(
                f"{shown(self.path)} fails on float32 {tuple(x.shape)} in 0 to 255 ({_last_line(error)}); "
                "let it resize and normalise by itself"
            ) from error
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            got = tuple(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise InputError(
                f"{shown(self.path)} answers {len(images)} images with {got}: wanted ({len(images)}, F); "
                "flatten or pool in the file"
            )
        return found.float()


def feature_blocks(
    extractor: FeatureExtractor,
    images: ImageSet,
    ids: Int[Tensor, " S"],
    *,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> Iterator[Float[Tensor, "B F"]]:
    """Features of the images named, in that order, in float32 blocks on the CPU.

    Args:
        extractor: what turns images into features.
        images: float images in [-1, 1], rounded to 8 bits, or a store.
        ids: rows of `images`.
        memory: bytes to work in.
        progress: show a bar on the standard error.

    Raises:
        InputError: a feature that is NaN or infinite.
    """
    rows = rows_within(memory, extractor.bytes_per_image, at_most=_MOST_ROWS, what="features", share=2)
    name = extractor.identity["name"]
    with tqdm(total=len(ids), desc=f"features: {name}", unit="img", disable=not progress) as bar:
        for some in ids.split(rows):
            block = take(images, some)
            if isinstance(images, Tensor):
                block = to_float(to_uint8(block))
            found = extractor(block.to(extractor.device)).float().cpu()
            if not bool(found.isfinite().all()):
                raise InputError(f"features {name}: NaN or infinity; does the network normalise by itself?")
            yield found
            bar.update(len(some))


def _first_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).strip().splitlines()[0])[:200]


def _last_line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).strip().splitlines()[-1])[:200]
