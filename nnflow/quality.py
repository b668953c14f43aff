"""How like a set of images samples are, in the features of an extractor.

`frechet` (FID), `mmd` (KID) and `manifold` (precision and recall) side by side, of samples against the
training images, against images held out, and of held-out images against the training images: the null,
what these figures say of images that nobody generated. The null takes as many images as there are
samples, for three of the four figures depend on how many.

A set is read once: its moments are streamed over all images, the rest works on at most `KEPT` of them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError
from nnflow.features import FeatureExtractor, feature_blocks
from nnflow.frechet import GROUPS, FrechetDistance, Moments, frechet_distance, grouped_moments, merged
from nnflow.imageset import ImageSet, check_images, draw, image_shape
from nnflow.manifold import NEIGHBOURS, PrecisionRecall, precision_recall
from nnflow.memory import DEFAULT_BUDGET
from nnflow.mmd import KernelDistance, kernel_distance
from nnflow.store import ImageStore

KEPT = 10_000  # features held for the kernel and the balls: 80 MB at F = 2,048
_GROUPED = 2048  # above so many features no jackknife: each of its ten distances takes 10 s and more


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureSet:
    """What the figures need of one set of images.

    Attributes:
        extractor: its identity, and F as `features`.
        count: images behind the moments.
        groups: their moments, dealt out to the groups of the jackknife.
        kept: features of at most `KEPT` of them, in random order: any first m are a random m.
    """

    extractor: dict[str, Any]
    count: int
    groups: tuple[Moments, ...]
    kept: Float[Tensor, "m F"]

    @property
    def moments(self) -> Moments:
        """Of all images."""
        return merged(self.groups)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One set of images against another, the reference."""

    frechet: FrechetDistance
    kernel: KernelDistance
    precision_recall: PrecisionRecall


@dataclass(frozen=True, kw_only=True)
class ImageQuality:
    """The figures under one extractor; None where the images were not given.

    Attributes:
        extractor: identity of the extractor, and F as `features`.
        to_training: samples against the training images.
        to_held_out: samples against the held-out images.
        null: as many held-out images as there are samples, or all, against the training images.
        seed: of the draws: images of the null, images kept, subsets.
    """

    extractor: dict[str, Any]
    to_training: Quality | None
    to_held_out: Quality | None
    null: Quality | None
    seed: int


def feature_set(
    extractor: FeatureExtractor,
    images: ImageSet,
    *,
    count: int | None = None,
    seed: int = 0,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> FeatureSet:
    """Reads `images` once through `extractor`.

    Args:
        extractor: see `features`.
        images: a store, or float (S, C, H, W) in [-1, 1].
        count: take so many of them, drawn by `seed`; None takes all.
        seed: of the choice and of the order.
        memory: bytes to work in, beside what is returned.
        progress: show a bar on the standard error.

    Raises:
        InputError: no images, NaN among them, or more wanted than there are.
    """
    check_images(images, "images", image_shape(images))
    # read in the order of the file, whatever was drawn: i mod g then deals classes out evenly, too
    ids = draw(images, count, seed=seed).sort().values
    places = draw(ids, min(KEPT, len(ids)), seed=seed)
    kept: list[Tensor] = []
    blocks = feature_blocks(extractor, images, ids, memory=memory, progress=progress)
    first = next(blocks)
    width = first.shape[1]
    few = width > _GROUPED or len(ids) < 2 * GROUPS
    stream = _keeping(chain([first], blocks), torch.isin(torch.arange(len(ids)), places), kept)
    groups = grouped_moments(stream, groups=1 if few else GROUPS)
    return FeatureSet(
        extractor={**extractor.identity, "features": width},
        count=len(ids),
        groups=groups,
        kept=torch.cat(kept)[places.argsort().argsort()],
    )


def _keeping(blocks: Iterable[Tensor], wanted: Tensor, kept: list[Tensor]) -> Iterator[Tensor]:
    """The blocks as they come; the rows `wanted` are put into `kept` on the way."""
    start = 0
    for block in blocks:
        kept.append(block[wanted[start : start + len(block)]])
        start += len(block)
        yield block


def compare(
    samples: FeatureSet, reference: FeatureSet, *, seed: int = 0, memory: int = DEFAULT_BUDGET
) -> Quality:
    """All figures of one set against another.

    The Frechet distance is taken of all images of both; KID and precision and recall of those kept, the
    latter of equally many on both sides.

    Args:
        samples: of `feature_set`.
        reference: likewise, from the same extractor.
        seed: of KID's subsets.
        memory: bytes for the distances.

    Raises:
        InputError: other extractors, or four images or fewer on a side.
    """
    if samples.extractor != reference.extractor:
        raise InputError(
            f"features of {samples.extractor} and of {reference.extractor}: wanted one extractor for both"
        )
    equal = min(len(samples.kept), len(reference.kept))
    return Quality(
        frechet=frechet_distance(samples.groups, reference.moments),
        kernel=kernel_distance(samples.kept, reference.kept, seed=seed),
        precision_recall=precision_recall(samples.kept[:equal], reference.kept[:equal], memory=memory),
    )


def image_quality(
    extractor: FeatureExtractor,
    training: ImageSet,
    *,
    samples: ImageSet | None = None,
    held_out: ImageSet | None = None,
    seed: int = 0,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> ImageQuality:
    """Samples against training and held-out images, and the null, under one extractor.

    Args:
        extractor: see `features`.
        training: the training images.
        samples: the generated images.
        held_out: images of the same kind that were not trained on.
        seed: of every draw.
        memory: bytes to work in, beside the features kept.
        progress: show bars on the standard error.

    Raises:
        InputError: neither samples nor held-out images, too few of them, or of another shape, or latents.
    """
    if samples is None and held_out is None:
        raise InputError("nothing to compare with the training images: pass samples or held-out images")
    if isinstance(training, ImageStore):
        training.refuse_latents("features")
    for what, images in (("samples", samples), ("held-out images", held_out)):
        if images is not None:
            check_images(images, what, image_shape(training))
            if len(images) <= NEIGHBOURS:  # told before the training images are read
                raise InputError(f"{len(images)} {what}: precision and recall need at least {NEIGHBOURS + 1}")

    def read(images: ImageSet, count: int | None = None) -> FeatureSet:
        return feature_set(extractor, images, count=count, seed=seed, memory=memory, progress=progress)

    trained = read(training)
    ours = None if samples is None else read(samples)
    theirs = None if held_out is None else read(held_out)
    null = theirs
    if held_out is not None and ours is not None and ours.count < len(held_out):
        null = read(held_out, ours.count)

    def against(found: FeatureSet | None, reference: FeatureSet | None) -> Quality | None:
        if found is None or reference is None:
            return None
        return compare(found, reference, seed=seed, memory=memory)

    return ImageQuality(
        extractor=trained.extractor,
        to_training=against(ours, trained),
        to_held_out=against(ours, theirs),
        null=against(null, trained),
        seed=seed,
    )
