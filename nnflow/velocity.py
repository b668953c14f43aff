"""The closed-form velocity of flow matching onto a finite set of images.

    u*(x, t) = (m(x, t) - x) / (1 - t),    m(x, t) = sum_i w_i x_i                             (1)
    w = softmax_i(l_i),    l_i = -|x - t x_i|^2 / (2 (1-t)^2)                                  (3)

t = 0 is noise, t = 1 is data (Bertrand et al. 2025, arXiv 2506.03719; derived in docs/field.md, whose
equation numbers these are). Images are float32 (B, C, H, W) in [-1, 1].
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nnflow.errors import InputError
from nnflow.farfield import NearAndFar
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.memory import DEFAULT_BUDGET
from nnflow.nearfield import NearestImages
from nnflow.path import along, score_from_mean, time_of_sigma, velocity_from_mean
from nnflow.pixels import PixelRows
from nnflow.planned import Calibrated
from nnflow.precision import full_float32
from nnflow.scan import AllImages
from nnflow.store import ImageStore
from nnflow.support import Part, Support
from nnflow.weighted import WeightedMean

_LARGEST = 1e12  # its square times any number of pixels, divided by the least search time, is a float32


class Velocity(ABC):
    """A velocity field on images: what samples, targets and measurements ask of any of them."""

    shape: tuple[int, int, int]  # (C, H, W)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where queries live."""

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Velocity (B, C, H, W) at `x` and time `t` in [0, 1)."""


@dataclass(frozen=True)
class Estimate:
    """What the field knows at B queries.

    Attributes:
        velocity: (mean - x) / (1 - t).
        mean: posterior mean of the data, E[x1 | x_t = x].
        far_mass: share of the mass of images that were only estimated, in [0, 1].
        tail_mass: upper bound on the share of the soft-max mass not summed in pixels, in [0, 1], 1 where
            unknown; of a far field the estimate `far_mass`, which is no bound.
        bound: |velocity - exact| <= bound in L2, in exact arithmetic; inf where nothing is known.
        ess: effective sample size 1 / sum w^2 of the images summed or estimated, at least 1.
        ids: the images summed in pixels, as rows of the store; n + i for the mirror image of i, -1 for
            none. Not filled in where all were.
        whole: whether all images were summed in pixels.
        candidates: how many were.
        error: the 99th percentile of the relative velocity error that calibration measured for the ladder
            used, on paths to stored images: the larger of those at the two measured times about t, of all
            classes together. 0 for the exact field, nan where none was measured.
        ladder: how each query's sum was taken: "exact", "index/100" (what the index finds), "index/8 in 2
            lists", "512/100" (far field in 512 coordinates, 100 images in pixels), "64/16 alone" (no far
            field), "512/30 of 65536" (of a sample that stands for all), "512/300 rest of 262144" (of one for
            those that are not among the first 300). With flips, how that of the images unmirrored was.
    """

    velocity: Float[Tensor, "B C H W"]
    mean: Float[Tensor, "B C H W"]
    far_mass: Float[Tensor, " B"]
    tail_mass: Float[Tensor, " B"]
    bound: Float[Tensor, " B"]
    ess: Float[Tensor, " B"]
    ids: Int[Tensor, "B K"]
    whole: Bool[Tensor, " B"]
    candidates: Int[Tensor, " B"]
    error: Float[Tensor, " B"]
    ladder: tuple[str, ...]


class EmpiricalVelocity(Velocity):
    """The velocity (1) of the images in a store: `exact`, `near_and_far`, or of the `nearest` alone.

    Not differentiable: a target and an ODE field, not a layer. Build it once, query it many times.
    """

    def __init__(self, support: Support, store: ImageStore, *, flip: bool = False) -> None:
        store.refuse_flip(flip)
        self.support = support
        self.store = store
        self.flip = flip
        self.shape = store.shape[1:]

    @property
    def device(self) -> torch.device:
        """Where queries live."""
        return self.support.rows.device

    @classmethod
    def exact(
        cls,
        store: ImageStore,
        *,
        flip: bool = False,
        memory: int = DEFAULT_BUDGET,
        device: torch.device | str | None = None,
    ) -> "EmpiricalVelocity":
        """The whole sum, streamed in blocks; any number of images.

        Args:
            store: the images.
            flip: sum over their mirror images too, as under random horizontal flips.
            memory: working memory in bytes.
            device: where queries live; a GPU when there is one.
        """
        return cls(AllImages(_rows(store, device), budget=memory), store, flip=flip)

    @classmethod
    def nearest(
        cls,
        index: NeighbourIndex,
        *,
        k: int = 100,
        flip: bool = False,
        memory: int = DEFAULT_BUDGET,
        device: torch.device | str | None = None,
    ) -> "EmpiricalVelocity":
        """The sum over the `k` images nearest to x / t in the index's coordinates.

        Right where few images matter (t >= .2 on CIFAR-10), wrong by tens of percent below t = .1; the
        estimate's `bound` says so wherever the index is flat.

        Args:
            index: the images and where to find them.
            k: images summed per query, and as many mirror images with `flip`.
            flip: sum over mirror images too.
            memory: working memory in bytes.
            device: where queries live; a GPU when there is one.
        """
        if k < 1:
            raise InputError(f"k = {k}: wanted at least 1 neighbour")
        support = NearestImages(index, _rows(index.store, device), k=k, budget=memory)
        return cls(support, index.store, flip=flip)

    @classmethod
    def near_and_far(
        cls,
        index: NeighbourIndex,
        *,
        tolerance: float | None = None,
        k: int | None = None,
        rank: int | None = None,
        levels: Sequence[tuple[int, int]] | None = None,
        flip: bool = False,
        memory: int = DEFAULT_BUDGET,
        device: torch.device | str | None = None,
    ) -> "EmpiricalVelocity":
        """The images that matter in pixels, all others by a few of their coordinates: right at every t.

        With `k` and `rank`, or `levels`, one ladder answers at every time. Otherwise the index must have
        been calibrated (`nnflow calibrate`), and each time is answered by the cheapest ladder whose 99th
        percentile of the relative velocity error met `tolerance` there, on paths to stored images and to
        images held out, or by the exact field.

        Args:
            index: the images, their coordinates, and the calibration.
            tolerance: relative velocity error; 0.01 when nothing is given.
            k: images in pixels per query; 100 when only `rank` is given.
            rank: coordinates of the others, rounded up to 32, 64, 128, ...; 512 when only `k` is given.
            levels: (coordinates, images passed on) from coarse to fine, e.g. [(64, 3000), (512, 100)].
            flip: sum over mirror images too.
            memory: working memory in bytes.
            device: where queries live; a GPU when there is one.

        Raises:
            InputError: a tolerance beside a ladder, or one that is not positive.
            StoreError: a tolerance, and no calibration of this index.
        """
        fixed = (k, rank, levels) != (None, None, None)
        if (fixed and tolerance is not None) or (levels is not None and (k, rank) != (None, None)):
            raise InputError("wanted one of: tolerance; k and rank; levels")
        rows = _rows(index.store, device)
        support: Support
        if fixed:
            ladder = Ladder.of(
                [(512 if rank is None else rank, 100 if k is None else k)] if levels is None else levels
            )
            support = NearAndFar(index, rows, ladder=ladder, budget=memory)
        else:
            support = Calibrated.within(0.01 if tolerance is None else tolerance, index, rows, budget=memory)
        return cls(support, index.store, flip=flip)

    def without_far(self) -> "EmpiricalVelocity":
        """The field of the images this one sums in pixels; itself where it estimates nothing."""
        return EmpiricalVelocity(self.support.without_far(), self.store, flip=self.flip)

    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Velocity at `x`; see `estimate`."""
        return self.estimate(x, t, label).velocity

    @full_float32()
    @torch.no_grad()
    def estimate(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Estimate:
        """Velocity at `x`, and how far it can be from that of all images.

        Args:
            x: float32 (B, C, H, W) on the field's device.
            t: in [0, 1): one for all, or (B,).
            label: restricts the sum to one class: one for all, or int64 (B,).

        Raises:
            InputError: wrong shape, type, device, NaN, a time outside [0, 1), an unknown label.
            StoreError: the file of the images has been written to since it was opened.
        """
        times = self._checked(x, t)
        self.store.check_unchanged()
        flat = x.flatten(1)
        return self._estimate(self._over_classes(flat, times, label), x, times)

    def mean(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Posterior mean E[x1 | x_t = x], (B, C, H, W)."""
        return self.estimate(x, t, label).mean

    @torch.no_grad()
    def score(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Grad log p_t(x) = (t m - x) / (1 - t)^2, (B, C, H, W)."""
        return score_from_mean(self.mean(x, t, label), x, t)

    def denoiser(self, y: Tensor, sigma: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """E[data | data + sigma noise = y], the denoiser D(y, sigma) of Karras et al. 2022, eq. 2.

        Args:
            y: float32 (B, C, H, W), the noisy image in units of the data.
            sigma: noise level in (0, inf), one or (B,).
            label: as in `estimate`.
        """
        level = torch.as_tensor(sigma, dtype=torch.float32, device=y.device)
        if not bool(((level > 0) & level.isfinite()).all()):
            raise InputError(f"noise level {_range(level)}: wanted positive and finite sigma")
        t = time_of_sigma(level)
        if not bool((t < 1).all()):
            raise InputError(
                f"noise level {_range(level)}: wanted above 6e-8, where 1 / (1 + sigma) rounds to 1"
            )
        return self.mean(along(t, y) * y, t, label)

    def _checked(self, x: Tensor, t: Tensor | float) -> Float[Tensor, " B"]:
        wanted = f"wanted float32 (B, {', '.join(map(str, self.shape))})"
        if x.ndim == 0 and torch.as_tensor(t).ndim == 4:
            raise InputError(
                f"x is one number and t an image: {wanted}; a solver that calls f(t, x), as torchdiffeq's, "
                "takes `lambda t, x: field(x, t)`"
            )
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self.shape):
            raise InputError(f"x of shape {tuple(x.shape)}: {wanted}, the shape of the stored images")
        if x.dtype != torch.float32:
            raise InputError(f"x of type {x.dtype}: {wanted}; use x.float()")
        if x.device.type != self.device.type:
            raise InputError(f"x on {x.device}: the field lives on {self.device}; use x.to('{self.device}')")
        if not bool((x.abs() <= _LARGEST).all()):  # False for NaN too
            raise InputError(f"x holds NaN, infinity or values above {_LARGEST:g}: squares would overflow")
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        if times.ndim > 1 or (times.ndim == 1 and len(times) not in (1, len(x))):
            raise InputError(f"t of shape {tuple(times.shape)}: wanted one time, or one for each of {len(x)}")
        if not bool(((times >= 0) & (times < 1)).all()):
            raise InputError(
                f"time {_range(times)}: wanted [0, 1); at t = 1 the velocity off the data is infinite. An "
                "adaptive solver of torchdiffeq oversteps unless options={'step_t': [its last time]}"
            )
        return times.expand(len(x)).contiguous()

    def _groups(self, label: Tensor | int | None, count: int) -> list[tuple[Tensor, slice]]:
        """Which queries ask for which slice of the store."""
        if label is None:
            return [(torch.arange(count, device=self.device), slice(0, len(self.store)))]
        classes = len(self.store.classes)
        if classes == 0:
            raise InputError("label given, but the images have no classes: index a class-per-folder source")
        labels = torch.as_tensor(label, device=self.device)
        if labels.is_floating_point() or labels.ndim > 1 or labels.numel() not in (1, count):
            raise InputError(
                f"label of shape {tuple(labels.shape)}, {labels.dtype}: wanted one integer, or one for each "
                f"of {count} queries"
            )
        if not bool(((labels >= 0) & (labels < classes)).all()):
            raise InputError(f"label {_range(labels)}: wanted 0 to {classes - 1}")
        labels = labels.expand(count)
        return [
            ((labels == value).nonzero()[:, 0], self.store.class_rows(value))
            for value in labels.unique().tolist()
        ]

    def _over_classes(self, x: Tensor, t: Tensor, label: Tensor | int | None) -> Part:
        groups = self._groups(label, len(x))
        if not len(x):  # nothing to divide into blocks, nor to join
            return Part.summed(WeightedMean.empty(x), "exact", ids=0)
        asked = self._with_mirror if self.flip else self.support.part
        parts = [asked(x[rows], t[rows], images) for rows, images in groups]
        return parts[0] if label is None else Part.joined(parts, [rows for rows, _ in groups])

    def _with_mirror(self, x: Tensor, t: Tensor, images: slice) -> Part:
        """The mirror images too: flip(x_i).q = x_i.flip(q), so the mirrored x is asked for."""
        found = self.support.pairs(x, self._mirror(x), t, images)
        second = torch.arange(2 * len(x), device=x.device) >= len(x)
        part, other = found.take(~second), found.take(second)
        mirrored = replace(other.weighted, mean=self._mirror(other.weighted.mean))
        theirs = torch.where(other.ids < 0, -1, other.ids + len(self.store))
        return Part(
            weighted=part.weighted.merge(mirrored),
            log_tail=part.log_tail.logaddexp(other.log_tail),
            ids=torch.cat([part.ids, theirs], 1),
            whole=part.whole & other.whole,
            candidates=part.candidates + other.candidates,
            log_far=part.log_far.logaddexp(other.log_far),
            ladders=part.ladders,
            errors=torch.maximum(part.errors, other.errors),
        )

    def _estimate(self, part: Part, x: Tensor, t: Tensor) -> Estimate:
        mean = part.weighted.mean
        # eps = R / (S + R); |m - m*| <= eps max_i |x_i - m|  (docs/field.md, eq. 7)
        tail = (part.log_tail - part.weighted.log_mass).sigmoid()
        reach = self.support.reach(mean)
        if self.flip:  # a mirror image is as far from the mean as the image is from the mirrored mean
            reach = torch.maximum(reach, self.support.reach(self._mirror(mean)))
        bound = tail * reach / (1 - t.double())
        bound = bound.masked_fill(part.log_tail.isposinf() | ~part.log_far.isneginf(), torch.inf)
        far = (part.log_far - part.weighted.log_mass).exp()
        images = mean.view_as(x)
        return Estimate(
            velocity=velocity_from_mean(images, x, t),
            mean=images,
            far_mass=far.float(),
            tail_mass=(tail + (1 - tail) * far).clamp_max(1).float(),
            bound=bound.float(),
            ess=part.weighted.ess.clamp_min(1).float(),
            ids=part.ids,
            whole=part.whole,
            candidates=part.candidates,
            error=part.errors.float(),
            ladder=part.ladders,
        )

    def _mirror(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        return x.view(len(x), *self.shape).flip(-1).flatten(1)


class HybridVelocity(Velocity):
    """One field before time `tau`, another from `tau` on: `before` on [0, tau), `after` on [tau, 1).

    With u* before and a learned field after, the experiment of arXiv 2506.03719: samples stay
    as they are while tau is small, and become training images when it is not.
    """

    def __init__(self, before: Velocity, after: Velocity, tau: float) -> None:
        if not 0 <= tau <= 1:
            raise InputError(f"tau = {tau:g}: wanted a time in [0, 1]")
        if tuple(before.shape) != tuple(after.shape):
            raise InputError(
                f"fields on images of {tuple(before.shape)} and {tuple(after.shape)}: wanted the same shape"
            )
        self.before, self.after, self.tau = before, after, tau
        self.shape = before.shape

    @property
    def device(self) -> torch.device:
        """Where queries live."""
        return self.before.device

    def __call__(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Velocity of the field in charge at `t`; a batch of times may straddle tau."""
        times = torch.as_tensor(t, device=x.device)
        early = times < self.tau
        if bool(early.all()):
            return self.before(x, t, label)
        if not bool(early.any()):
            return self.after(x, t, label)
        labels = None if label is None else torch.as_tensor(label, device=x.device).expand(len(x))
        velocity = torch.empty_like(x)
        for field, rows in ((self.before, early), (self.after, ~early)):
            velocity[rows] = field(x[rows], times[rows], None if labels is None else labels[rows])
        return velocity


def _rows(store: ImageStore, device: torch.device | str | None) -> PixelRows:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return store.rows(device)


def _range(values: Tensor) -> str:
    if values.isnan().any():
        return "NaN"
    low, high = values.min().item(), values.max().item()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
