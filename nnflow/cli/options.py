"""Option types and helpers that several commands share."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from nnflow.calibration import Calibration
from nnflow.classifier import Classifier
from nnflow.embedding import Embedding
from nnflow.errors import InputError, NNFlowError, StoreError
from nnflow.features import FeatureExtractor, Pixels, PrincipalCoordinates, Scripted
from nnflow.files import disk_errors, shown
from nnflow.index import NeighbourIndex
from nnflow.latents import Decode, open_decoder
from nnflow.manifest import EMBEDDING
from nnflow.memory import parse_bytes
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity

F = TypeVar("F", bound=Callable[..., Any])
MAX_SEEDS = 1_000_000
ESTIMATORS = ("exact", "nearest", "near-and-far")
TOLERANCE = 0.01


class MemoryType(click.ParamType):
    """A memory budget in words."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes."""
        try:
            return parse_bytes(value)
        except NNFlowError as error:
            self.fail(str(error), param, ctx)


class RankType(click.ParamType):
    """A number of PCA coordinates, or "pixels"."""

    name = "n|pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """An int or "pixels"."""
        if value == "pixels":
            return value
        try:
            return click.IntRange(min=1).convert(value, param, ctx)
        except click.BadParameter:
            self.fail(f"{value!r}: wanted a whole number of coordinates, or pixels", param, ctx)


class SeedsType(click.ParamType):
    """Seeds such as 0-63 or 1,5,8-10."""

    name = "seeds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """All seeds, in the order given."""
        if isinstance(value, tuple):
            return value
        seeds: list[int] = []
        for part in value.split(","):
            match = re.fullmatch(r"\s*(\d{1,18})(?:-(\d{1,18}))?\s*", part)
            if match is None:
                self.fail(f"{value!r}: wanted seeds such as 0-63 or 1,5,8-10", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last - first + len(seeds) >= MAX_SEEDS:
                self.fail(f"{value!r}: wanted ascending ranges of at most {MAX_SEEDS} seeds", param, ctx)
            seeds.extend(range(first, last + 1))
        return tuple(seeds)


class ListType(click.ParamType):
    """Comma-separated values of another type."""

    def __init__(self, inner: click.ParamType) -> None:
        self.inner = inner
        self.name = f"{inner.name},..."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """Each value."""
        if isinstance(value, tuple):
            return value
        return tuple(self.inner.convert(part.strip(), param, ctx) for part in value.split(","))


FOLDER = click.Path(path_type=Path)
MEMORY = MemoryType()


def memory_option(function: F) -> F:
    """--memory, the working memory beside the images themselves."""
    return click.option(
        "--memory", type=MEMORY, default="1GiB", show_default=True, help="Working memory, e.g. 512MiB."
    )(function)


def estimator_options(*, default: str | None) -> Callable[[F], F]:
    """--estimator, --tolerance and --k: how the sum over the images is taken.

    With no default the best that the index allows is chosen, by `chosen_estimator`.
    """

    def added(function: F) -> F:
        function = click.option(
            "--k", type=click.IntRange(min=1), default=100, show_default=True, help="Neighbours of nearest."
        )(function)
        function = tolerance_option("Relative velocity error of near-and-far.")(function)
        return click.option(
            "--estimator",
            type=click.Choice(ESTIMATORS),
            default=default,
            show_default=default or "near-and-far where the index is calibrated, else exact",
            help="Sum over all images, over the k that the index finds, or over those that matter in "
            "pixels and all others by a few coordinates.",
        )(function)

    return added


def tolerance_option(help_text: str) -> Callable[[F], F]:
    """--tolerance, a relative velocity error."""
    return click.option(
        "--tolerance",
        type=click.FloatRange(min=0, min_open=True),
        default=TOLERANCE,
        show_default=True,
        help=help_text,
    )


def device_option(function: F) -> F:
    """--device, a torch device."""
    return click.option("--device", default=None, help="cpu, cuda, cuda:1 ...; a GPU when there is one.")(
        function
    )


def decode_option(function: F) -> F:
    """--decode, a file that makes pictures of latents."""
    return click.option(
        "--decode",
        type=FOLDER,
        default=None,
        help="Of latents: their decoder, a TorchScript or .pt2 file, from latents as in the source (B, C, H, "
        "W) to pictures in [-1, 1]. Without it no pictures are drawn.",
    )(function)


def chosen_decoder(path: Path | None, store: ImageStore, device: torch.device) -> Decode | None:
    """The decoder in `path`; None, with a note for latents, where there is none.

    Raises:
        InputError: not a decoder, or for a store of pixels.
    """
    if path is not None:
        if store.codec.of_pixels:
            raise InputError(f"--decode {shown(path)}: {shown(store.folder)} holds pixels, leave it out")
        return open_decoder(path, device)
    if not store.codec.of_pixels:
        click.echo("latents: no pictures are drawn without their decoder, --decode FILE", err=True)
    return None


def chosen_device(name: str | None) -> torch.device:
    """The device called `name`, or the best there is.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {shown(name)}: not to be had here; wanted cpu, or cuda with a GPU"
        ) from error
    return device


@dataclass(frozen=True)
class Estimator:
    """How the sum over the images is taken: one of `ESTIMATORS`, and what applies to it."""

    estimator: str
    k: int | None
    tolerance: float | None


def chosen_estimator(out: Path, name: str | None, *, k: int, tolerance: float) -> Estimator:
    """The one asked for; where none was, near-and-far if `out` is calibrated, else exact with a note."""
    if name is None:
        name = "near-and-far"
        try:
            Calibration.open(NeighbourIndex.open(out))
        except StoreError as error:
            click.echo(f"estimator exact, near-and-far cannot be had: {shown(error)}", err=True)
            name = "exact"
    return Estimator(name, k if name == "nearest" else None, tolerance if name == "near-and-far" else None)


def empirical_field(
    out: Path, chosen: Estimator, *, flip: bool, memory: int, device: torch.device
) -> EmpiricalVelocity:
    """u* of the images in `out`, or its estimate."""
    if chosen.estimator == "exact":
        return EmpiricalVelocity.exact(ImageStore.open(out), flip=flip, memory=memory, device=device)
    index = NeighbourIndex.open(out)
    if chosen.k is not None:
        return EmpiricalVelocity.nearest(index, k=chosen.k, flip=flip, memory=memory, device=device)
    return EmpiricalVelocity.near_and_far(
        index, tolerance=chosen.tolerance, flip=flip, memory=memory, device=device
    )


def chosen_extractor(text: str, out: Path, store: ImageStore, device: torch.device) -> FeatureExtractor:
    """The features called `text`, of images like those of `store`, which lies in `out`.

    Raises:
        InputError: none of that name.
    """
    kind, _, rest = text.partition(":")
    if text == "pixels":
        return Pixels(store.shape[1:])
    if kind == "pca" and (text == "pca" or rest.isdecimal()):
        return PrincipalCoordinates.leading(Embedding.open(out / EMBEDDING), int(rest) if rest else None)
    if kind == "classifier" and rest:
        return Classifier.open(rest, device=device)
    if kind == "torchscript" and rest:
        return Scripted.open(rest, device=device)
    raise InputError(
        f"features {shown(text)}: wanted pixels, pca, pca:64, classifier:DIR or torchscript:FILE"
    )


def class_number(store: ImageStore, name: str | None) -> int | None:
    """The label of the class called `name`, or numbered so.

    Raises:
        InputError: no such class.
    """
    if name is None:
        return None
    if name in store.classes:
        return store.classes.index(name)
    if name.isdecimal() and int(name) < len(store.classes):
        return int(name)
    known = ", ".join(shown(known) for known in store.classes[:10]) or "none: the images have no classes"
    raise InputError(f"class {shown(name)!r}: wanted one of {known}")


def new_folder(out: Path) -> Path:
    """`out`, made where it is missing."""
    with disk_errors(out, "creating"):
        out.mkdir(parents=True, exist_ok=True)
    return out
