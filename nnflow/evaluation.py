"""What a run did: how many samples are copies, and where a network departs from u*.

The network is compared with u* on the path it was trained on,

    x_t = (1 - t) x0 + t x1,   x0 ~ N(0, I),   0 = noise, 1 = data                          (1)

with x1 a training image, and, when given, with x1 a held-out image as well: at a training image's
x_t the two agree or the network has not learned; at a held-out one, u* points to training images
all the same, and a network that generalises does not. How good the samples look is told in features
(`quality`): Frechet distance, KID, precision and recall.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnflow.errors import InputError
from nnflow.features import FeatureExtractor
from nnflow.imageset import ImageSet, check_images, image_shape, take
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.metrics import (
    DistanceHistogram,
    MemorisedFraction,
    PairErrors,
    VelocityError,
    count_distances,
    count_memorised,
    histogram_edges,
    need_two,
    pair_errors,
    summarise,
)
from nnflow.path import interpolate
from nnflow.quality import ImageQuality, image_quality
from nnflow.sampling import noise_of
from nnflow.scan import nearest_images
from nnflow.store import ImageStore
from nnflow.velocity import EmpiricalVelocity

Field = Callable[..., Tensor]  # called as (x, t), or (x, t, label) when conditional

# Early times are where the sum has many terms, t -> 1 is where 1 / (1 - t) magnifies every error.
TIMES = (0.0, 0.02, 0.05, *(i / 20 for i in range(2, 20)), 0.98, 0.99)

# Bytes of one pair during a call of the network, in float32 images: a U-Net keeps a few feature
# maps of 128 channels where the image has 1 to 3. A guess on the safe side, not a measurement.
_IMAGES_PER_PAIR = 512


@dataclass(frozen=True, kw_only=True)
class Nearness:
    """How near a set of images lies to the training images.

    Attributes:
        memorised: share by d1 <= d2 / 3. Of held-out images it is the null: what the threshold
            says of images that nobody copied.
        copies: images equal to a training image in every byte (of latents: to the spacing of the stored
            numbers). They count as memorised, but for copies by a sampler of an image stored twice, which lie
            as near to the one as to the other but for rounding.
        histogram: of d1, L2 with pixels in [-1, 1], or of scaled latents.
    """

    memorised: MemorisedFraction
    copies: int
    histogram: DistanceHistogram


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything measured, with the counts and seeds behind it; None where it was not asked for.

    Attributes:
        n: training images.
        shape: (C, H, W) of one image.
        fingerprint: of the training images.
        samples: of the generated images.
        held_out: the same figures of held-out images, the null.
        error: of the network against u* on the paths to training images.
        held_out_error: the same on the paths to held-out images, from the same noise.
        flip: whether mirror images of training images counted as those, in `samples` and `held_out`.
        scaling: of latents, what they were multiplied by; None for pixels in [-1, 1].
        seed: of the noise and of the choice of images behind both errors, and of every draw in `quality`.
        sample_seeds: of the samples, as far as the caller knows them.
        quality: samples, held-out and training images against each other, for each extractor.
    """

    n: int
    shape: tuple[int, int, int]
    fingerprint: str
    samples: Nearness | None
    held_out: Nearness | None
    error: VelocityError | None
    held_out_error: VelocityError | None
    seed: int
    sample_seeds: tuple[int, ...]
    flip: bool = False
    scaling: float | None = None
    quality: tuple[ImageQuality, ...] = ()

    @property
    def d(self) -> int:
        """Values of one image, C * H * W."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """All fields and `d`, made of what JSON knows."""
        plain = dataclasses.asdict(self)
        return {"n": plain.pop("n"), "d": self.d, **plain}


def evaluate(
    store: ImageStore,
    *,
    samples: Tensor | None = None,
    held_out: ImageSet | None = None,
    learned: Field | None = None,
    field: Field | None = None,
    flip: bool = False,
    times: Sequence[float] = TIMES,
    pairs: int = 256,
    seed: int = 0,
    sample_seeds: Sequence[int] = (),
    extractors: Sequence[FeatureExtractor] = (),
    conditional: bool = False,
    device: torch.device | str | None = None,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> Evaluation:
    """Measures `samples`, `held_out` images and a `learned` velocity against the images of `store`.

    Args:
        store: the training images.
        samples: float32 (S, C, H, W) in [-1, 1], the generated images.
        held_out: images of the same kind that were not trained on: a store, or as `samples`.
        learned: u_theta, called as learned(x, t) with t a float.
        field: u*, called likewise; by default the exact one of `store`. A network trained with
            flips or under labels is to be compared with the field of the same flips.
        flip: a training image is as near as itself or its mirror image; for what was trained, or sampled,
            with flips.
        times: where the two velocities are compared, in [0, 1).
        pairs: pairs of noise and image, the same ones at every time.
        seed: of these pairs, which do not depend on `memory`.
        sample_seeds: of `samples`, to be kept beside the figures.
        extractors: features in which samples and held-out images are compared with the training images.
        conditional: whether both velocities take the label of x1 as a third argument.
        device: where `learned` and `field` live; by default where the field says it does.
        memory: bytes to work in, beside those of the two velocities' own making.
        progress: show bars on the standard error.

    Raises:
        InputError: nothing to measure, images of another shape, NaN, times outside [0, 1), fewer
            than two stored images, labels asked for where there are none, or features of no images.
    """
    if samples is None and held_out is None and learned is None:
        raise InputError("nothing to evaluate: pass samples, held-out images or a learned velocity")
    shape = image_shape(store)
    sets = {"samples": samples, "held-out images": held_out}
    for what, images in sets.items():
        if images is not None:
            need_two(len(store))
            check_images(images, what, shape)
            if isinstance(images, ImageStore):
                store.refuse_other_units(images, what)
    quality = tuple(
        image_quality(
            extractor, store, samples=samples, held_out=held_out, seed=seed, memory=memory, progress=progress
        )
        for extractor in extractors
    )
    errors: dict[str, VelocityError] = {}
    if learned is not None:
        _check_times(times, pairs)
        paths = _paths(store, held_out, conditional=conditional)
        if field is None:
            field = EmpiricalVelocity.exact(store, memory=memory, device=device)
        comparison = _Comparison(
            learned=learned,
            field=field,
            times=tuple(float(t) for t in times),
            pairs=pairs,
            seed=seed,
            device=getattr(field, "device", torch.device("cpu")) if device is None else device,
            memory=memory,
            progress=progress,
        )
        errors = {what: comparison.error(images, labels, what) for what, images, labels in paths}
    near = _nearness(store, sets, flip=flip, memory=memory, progress=progress)
    return Evaluation(
        n=len(store),
        shape=shape,
        fingerprint=store.fingerprint,
        samples=near.get("samples"),
        held_out=near.get("held-out images"),
        error=errors.get("training images"),
        held_out_error=errors.get("held-out images"),
        seed=seed,
        sample_seeds=tuple(int(s) for s in sample_seeds),
        flip=flip,
        scaling=None if store.codec.of_pixels else store.codec.scaling,
        quality=quality,
    )


def _check_times(times: Sequence[float], pairs: int) -> None:
    if pairs < 1:
        raise InputError(f"pairs {pairs}: wanted at least one")
    if not times:
        raise InputError("no times: wanted at least one in [0, 1)")
    wrong = [t for t in times if not 0 <= t < 1]
    if wrong:
        raise InputError(f"time {wrong[0]:g}: wanted times in [0, 1); u* has no value at t = 1")


def _nearness(
    store: ImageStore,
    sets: dict[str, ImageSet | None],
    *,
    flip: bool,
    memory: int,
    progress: bool,
) -> dict[str, Nearness]:
    """Of each set that is there, with histograms that share their edges."""
    found = {
        what: _two_nearest(store, images, what, flip=flip, memory=memory, progress=progress)
        for what, images in sets.items()
        if images is not None
    }
    edges = histogram_edges([distances[:, 0] for distances, _ in found.values()])
    return {
        what: Nearness(
            memorised=count_memorised(distances),
            copies=copies,
            histogram=count_distances(distances[:, 0], edges),
        )
        for what, (distances, copies) in found.items()
    }


def _two_nearest(
    store: ImageStore, images: ImageSet, what: str, *, flip: bool, memory: int, progress: bool
) -> tuple[Tensor, int]:
    """Distances (S, 2) of `images` to the two nearest of `store`, and how many are copies."""
    # Half for the images and their neighbours (float32, three of each alive), half for the scan.
    one = 4 * math.prod(image_shape(store))
    rows = rows_within(memory, 3 * one, at_most=len(images), what=what, share=2)
    distances, copies = [], 0
    with tqdm(total=len(images), desc=f"nearest of {what}", unit="img", disable=not progress) as bar:
        for start in range(0, len(images), rows):
            ids = torch.arange(start, min(start + rows, len(images)))
            block = take(images, ids)
            near = nearest_images(store, block, 2, flip=flip, memory=memory // 2)
            distances.append(near.distances.cpu())
            copies += int(store.codec.same(block.flatten(1), near.images(store).flatten(1)).sum())
            bar.update(len(ids))
    return torch.cat(distances), copies


def _paths(
    store: ImageStore, held_out: ImageSet | None, *, conditional: bool
) -> list[tuple[str, ImageSet, Tensor | None]]:
    """Where the paths end: a name, images, and their labels where these are asked for."""
    ends = {"training images": store, "held-out images": held_out}
    return [
        (what, images, _labels(images, store) if conditional else None)
        for what, images in ends.items()
        if images is not None
    ]


def _labels(images: ImageSet, store: ImageStore) -> Tensor:
    """Labels of `images` in the numbering of `store`."""
    if isinstance(images, Tensor) or not images.classes:
        raise InputError(
            "a class-conditional comparison needs labelled images; these have no classes: "
            "index a folder with one folder per class, or leave the held-out images out"
        )
    if images.classes != store.classes:
        raise InputError(
            f"held-out images of {len(images.classes)} classes and training images of "
            f"{len(store.classes)}, or with other names: wanted the same classes"
        )
    return images.labels


@dataclass(frozen=True, kw_only=True)
class _Comparison:
    """The two velocities, and where they are compared."""

    learned: Field
    field: Field
    times: tuple[float, ...]
    pairs: int
    seed: int
    device: torch.device | str
    memory: int
    progress: bool

    @torch.no_grad()
    def error(self, images: ImageSet, labels: Tensor | None, what: str) -> VelocityError:
        """Errors over all times on the paths from `pairs` noises to as many of `images`."""
        parts: list[list[PairErrors]] = [[] for _ in self.times]
        total = self.pairs * len(self.times)
        with tqdm(total=total, desc=f"error on {what}", unit="query", disable=not self.progress) as bar:
            for x0, x1, ids in self._pairs(images):
                extra = () if labels is None else (labels[ids].to(self.device),)
                for part, t in zip(parts, self.times, strict=True):
                    x = interpolate(x0, x1, t)
                    ours, theirs = self.learned(x, t, *extra), self.field(x, t, *extra)
                    for name, velocity in (("u_theta", ours), ("u*", theirs)):
                        if not bool(velocity.isfinite().all()):
                            raise InputError(f"{name} returned NaN or infinity at t = {t:g}")
                    part.append(pair_errors(ours.cpu(), theirs.cpu()))
                    bar.update(len(x))
        return summarise(self.times, [_joined(part) for part in parts])

    def _pairs(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Blocks of (x0, x1, ids) on the device."""
        bytes_per_pair = _IMAGES_PER_PAIR * 4 * math.prod(image_shape(images))
        rows = rows_within(self.memory, bytes_per_pair, at_most=self.pairs, what="pairs")
        for start in range(0, self.pairs, rows):
            x0, x1, ids = draw_pairs(images, self.pairs, seed=self.seed, rows=slice(start, start + rows))
            yield x0.to(self.device), x1.to(self.device), ids


def draw_pairs(images: ImageSet, pairs: int, *, seed: int, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs `rows` of all `pairs` of `seed`, the same whichever rows are asked for: x0, x1, ids of x1."""
    draw = torch.Generator().manual_seed(seed)
    noise_seeds = torch.randint(2**62, (pairs,), generator=draw)[rows].tolist()
    ids = torch.randint(len(images), (pairs,), generator=draw)[rows]
    return noise_of(noise_seeds, image_shape(images)), take(images, ids), ids


def _joined(parts: Sequence[PairErrors]) -> PairErrors:
    return PairErrors(
        squared=torch.cat([p.squared for p in parts]),
        relative=torch.cat([p.relative for p in parts]),
        cosine=torch.cat([p.cosine for p in parts]),
    )
