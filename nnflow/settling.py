"""From which time on a pair (x0, x1) has u* = x1 - x0: one time for every stored image.

On the path to image i, image j at distance d_j has a weight whose square root is on average at most
exp(-sigma_j^2 / 8), sigma_j = t d_j / (1-t). Summed over j, with how far each can move the mean,

    B_i(t) = sum_j sqrt(d_j / eta) 4 / (sqrt(2 pi) sigma_j) exp(-sigma_j^2 / 8)               (18)
    eta = tolerance sqrt(D) (1-t)

bounds the probability, over the noise x0, that u* differs from x1 - x0 by more than `tolerance` times
sqrt(D), the length of the noise (docs/field.md, section 13, whose equation number this is). It falls with
t; image i settles where it reaches `risk`. An image with a near-duplicate settles late.

The j are all other images and, of pixels, all mirror images, so that one time serves fields with and without
mirror images and of one class. Distances are those of the coordinates, which are no longer than those of the
pixels: the bound stays one. Pairs too close for them are measured in pixels.

Axes:  n images   b images of a block   B = 2b, they and their mirror images; b for latents, which have none
       R coordinates   D = C*H*W
"""

import math
import time
import warnings
import zipfile
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from nnflow import integers
from nnflow.errors import DegradedWarning, InputError, StoreError
from nnflow.files import quoted, shown, whole_file
from nnflow.index import NeighbourIndex
from nnflow.memory import DEFAULT_BUDGET, rows_within
from nnflow.precision import full_float32
from nnflow.products import BITS, FAINTEST, Buffer
from nnflow.store import ImageStore

SETTLING = "settling.npz"
FORMAT = "nnflow-settling-1"

_BLOCK = 64  # images, hence 128 queries; twice as many are no faster at n = 50,000
_TILE = 1 << 13  # images whose products with a block are taken at once
_TIMED = 4  # blocks after which the rest of the time is foreseen
_FAR_TOO_LONG = 10  # times the seconds allowed, foreseen from a few images: no more are read
# Two digits move an image by up to 0.035 % of its length: too much (4 % of d^2) for pairs closer than this
# share of it, which are measured in pixels. So are those closer than _CLOSEST, where float32 ends.
_CLOSE = 1 / 24
_CLOSEST = 0.1
_CROWD = 32  # images with more others that close never settle
_SUMMED = 1e-4  # of float32 sums and exponentials, relative
_HALVINGS = 26  # of [0, 1]: below float32's spacing near 1


@dataclass(frozen=True)
class _Others:
    """What is known of the distances d_j from each of b images to the others, L(c) = sum_j exp(-c d_j^2).

    Attributes:
        nearest: no d_j is less, `close` aside; 0 for a crowd.
        scale: a c.
        once: upper bound on log L(scale).
        twice: upper bound on log L(2 scale).
        close: the d_j measured in pixels, which are not in the sums; inf for none.
    """

    nearest: Float[Tensor, " b"]
    scale: Float[Tensor, " b"]
    once: Float[Tensor, " b"]
    twice: Float[Tensor, " b"]
    close: Float[Tensor, "b K"]

    @classmethod
    def joined(cls, parts: list["_Others"]) -> "_Others":
        """Those of several blocks."""
        width = max(part.close.shape[1] for part in parts)
        return cls(
            torch.cat([part.nearest for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.once for part in parts]),
            torch.cat([part.twice for part in parts]),
            torch.cat([pad(part.close, (0, width - part.close.shape[1]), value=torch.inf) for part in parts]),
        )

    def log_sum(self, c: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Upper bound on log L(c) over all d_j, falling with c; inf for c below `scale`.

        log L is convex: the chord lies above it between scale and 2 scale; beyond, no term falls more
        slowly than that of the nearest.
        """
        share = c / self.scale - 1
        inside = share.clamp_max(1)
        bound = (1 - inside) * self.once + inside * self.twice
        bound -= (c - 2 * self.scale).clamp_min(0) * self.nearest.square()
        bound = bound.masked_fill(share < 0, torch.inf)
        measured = -c[:, None] * self.close.square()
        return torch.cat([bound[:, None], measured], 1).logsumexp(1)


@full_float32()
def settling_times(
    index: NeighbourIndex,
    *,
    risk: float = 0.01,
    tolerance: float = 0.01,
    memory: int = DEFAULT_BUDGET,
    seconds: float = 600.0,
    progress: bool = False,
) -> Float[Tensor, " n"] | None:
    """Times in (0, 1] from which on x1 - x0 stands for u*, one for each stored image; 1 for never.

    Compares every image with every other and its mirror image, 2 n^2 distances; latents n^2.

    Args:
        index: the images and their coordinates.
        risk: at any time from its settling time on, no larger share of an image's pairs has a u* that
            differs by more than `tolerance`.
        tolerance: of x1 - x0, in units of sqrt(D), the length of the noise.
        memory: working memory in bytes.
        seconds: nothing is computed that would take longer.
        progress: show a bar on stderr.

    Returns:
        float32 times; None, with a `DegradedWarning`, where they would take too long.

    Raises:
        InputError: a risk outside (0, 1), a tolerance not above 0, too small a memory budget.
    """
    if not 0 < risk < 1 or not tolerance > 0:
        raise InputError(f"risk {risk:g}, tolerance {tolerance:g}: wanted in (0, 1), and above 0")
    count, dim, fall = len(index), index.store.rows().dim, max(1.0, -math.log(risk))
    step = rows_within(memory, 16 * count + 32 * dim, at_most=_BLOCK, what="distances")
    wanted = _foreseen(index, fall, step)
    if wanted > _FAR_TOO_LONG * seconds:
        _say_none(count, wanted, seconds)
        return None
    crowd = _Crowd(index, fall, count)
    starts, found, began = range(0, count, step), [], time.perf_counter()
    for start in tqdm(starts, "settling", disable=not progress, unit="block"):
        found.append(crowd.others(start, min(start + step, count)))
        if len(found) == _TIMED:
            wanted = (time.perf_counter() - began) * len(starts) / _TIMED
            if wanted > seconds:
                _say_none(count, wanted, seconds)
                return None
    return _times(_Others.joined(found), tolerance * math.sqrt(dim), risk)


def _foreseen(index: NeighbourIndex, fall: float, step: int) -> float:
    """Seconds for all images, from the coordinates of the first few and one block's distances to those.

    The coordinates of all 1,281,167 images at 64 x 64 take 7 minutes: too long to be told no only then.
    """
    few = min(_TILE, len(index))
    began = time.perf_counter()
    crowd = _Crowd(index, fall, few)
    times = [time.perf_counter()]
    for _ in range(_TIMED):  # the first takes memory, too
        crowd.others(0, min(step, few))
        times.append(time.perf_counter())
    block = min(after - before for before, after in pairwise(times))
    return len(index) / few * (times[0] - began + math.ceil(len(index) / step) * block)


def _say_none(count: int, wanted: float, seconds: float) -> None:
    """Says that settling times take too long."""
    warnings.warn(
        f"settling times of {count} images would take {wanted:.0f} s, more than {seconds:g} s: "
        "none computed, and targets ask the field at every time; allow more seconds",
        DegradedWarning,
        stacklevel=3,
    )


def _times(others: _Others, reach: float, risk: float) -> Float[Tensor, " b"]:
    """Where eq. 18 reaches `risk`, rounded up; eta = reach (1-t). Bisection, as the bound falls with t."""
    nearest = torch.cat([others.nearest[:, None], others.close], 1).amin(1)
    low, high = torch.zeros_like(nearest), torch.ones_like(nearest)
    for _ in range(_HALVINGS):
        t = (low + high) / 2
        snr = t / (1 - t)
        # sqrt(d_j) / sigma_j is 1 / (snr sqrt(d_j)), largest for the nearest
        log_first = 0.5 * math.log(8 / math.pi) - snr.log() - 0.5 * (reach * (1 - t) * nearest).log()
        settled = log_first + others.log_sum(snr.square() / 8) <= math.log(risk)
        low, high = torch.where(settled, low, t), torch.where(settled, t, high)
    times = high.float()
    return torch.where(times < high, times.nextafter(torch.ones(())), times)


class _Crowd:
    """The first so many images, and their mirror images where they have such, as each image sees them."""

    def __init__(self, index: NeighbourIndex, fall: float, count: int) -> None:
        self.embedding = index.embedding
        self.rows = index.store.rows()
        self.shape = index.store.shape[1:]
        self.ways = 2 if self.rows.codec.of_pixels else 1  # an image, and its mirror image
        self.fall = fall  # of the nearest's term in L(scale): exp(-fall)
        rank = len(self.embedding.principal)
        # z_j = unit_j (254 high_j + low_j): two bytes a coordinate, because one would hide near-duplicates
        self.digits = torch.empty(2, count, rank, dtype=torch.int8)
        self.units, self.squares = torch.empty(count), torch.empty(count)
        for start in range(0, count, _TILE):
            z = self.embedding.project(self._images(start, min(start + _TILE, count)))
            digits, units = integers.two_digits(z)
            self.digits[:, start : start + len(z)] = digits.view(2, *z.shape)
            self.units[start : start + len(z)] = units
            self.squares[start : start + len(z)] = z.square().sum(1)
        self._buffer = Buffer()

    def others(self, start: int, stop: int) -> _Others:
        """The distances of images `start` to `stop`."""
        z = self._coordinates(start, stop)
        length = z.norm(dim=1).view(self.ways, -1).amax(0)
        exponents = self._exponents(z)
        own = torch.arange(stop - start)  # would be found to be a copy, image by image
        exponents[own, own + start] = -torch.inf
        peak = exponents.amax(1)
        close, crowded = self._take_close(exponents, peak, (_CLOSE * length).clamp_min(_CLOSEST), start)
        # Where there is no other, an impossible distance: none are further apart than the diameter.
        square = (-2 * peak.float()).clamp_max(self.rows.diameter**2).view(self.ways, -1).amin(0)
        factor = 2 * self.fall / square
        terms = exponents.mul_(BITS * factor.repeat(self.ways)[:, None]).clamp_min_(FAINTEST).exp2_()
        kept = 1 - _rounding(length / square.sqrt(), self.digits.shape[2]).double()
        return _Others(
            nearest=(square.double() * kept).sqrt().masked_fill(crowded, 0.0),
            scale=0.5 * factor.double() / kept,
            once=self._log_sums(terms) + _SUMMED,
            twice=self._log_sums(terms.square_()) + _SUMMED,
            close=close,
        )

    def _images(self, start: int, stop: int) -> Float[Tensor, "b D"]:
        return self.rows.values(torch.arange(start, stop))

    def _coordinates(self, start: int, stop: int) -> Float[Tensor, "B R"]:
        """Those of the images, then those of their mirror images."""
        images = self._images(start, stop)
        if self.ways == 1:
            return self.embedding.project(images)
        return self.embedding.project(torch.cat([images, self._mirror(images)]))

    def _exponents(self, z: Float[Tensor, "B R"]) -> Float[Tensor, "B n"]:
        """-|z - z_j|^2 / 2 for every image j."""
        digits, units = integers.two_digits(z)
        count, base = self.digits.shape[1], 2 * integers.LEVELS
        exponents = self._buffer.take("logits", (len(z), count), z)
        for start in range(0, count, _TILE):
            here = slice(start, min(start + _TILE, count))
            high, low = (integers.product(digits, rows[here].T) for rows in self.digits)
            some = torch.mul(high[: len(z)], float(base**2), out=exponents[:, here])
            some.add_(high[len(z) :], alpha=base).add_(low[: len(z)], alpha=base).add_(low[len(z) :])
            some.mul_(units[:, None]).mul_(self.units[here]).sub_(self.squares[here], alpha=0.5)
        return exponents.sub_(z.square().sum(1, keepdim=True), alpha=0.5)

    def _take_close(
        self,
        exponents: Float[Tensor, "B n"],
        peak: Float[Tensor, " B"],
        within: Float[Tensor, " b"],
        start: int,
    ) -> tuple[Float[Tensor, "b K"], Bool[Tensor, " b"]]:
        """Takes pairs nearer than `within` out of `exponents`, mends `peak`, and measures them in pixels.

        Returns:
            the distances, inf for none; and which images have too many, whose distances are not measured.
        """
        count, limit = len(within), -0.5 * within.repeat(self.ways).square()
        found = (peak > limit).nonzero()[:, 0]
        some = exponents[found]
        near = some > limit[found, None]
        exponents[found] = some.masked_fill_(near, -torch.inf)
        peak[found] = some.amax(1)
        image, mirrored = found % count, found >= count
        crowded = torch.zeros(count).index_add_(0, image, near.sum(1).float()) > _CROWD
        row, other = (near & ~crowded[image, None]).nonzero().unbind(1)
        distances = self._in_pixels(start + image[row], other, mirrored[row])
        close = torch.full((self.ways * count, _CROWD), torch.inf, dtype=torch.float64)
        # A copy is the same image: it does not move the mean.
        place = torch.arange(len(row)) - torch.searchsorted(row, row)
        close[found[row], place] = distances.masked_fill(distances == 0, torch.inf)
        close = torch.cat(close.chunk(self.ways), 1)
        return close[:, close.isfinite().any(0)], crowded

    def _in_pixels(
        self, ids: Int[Tensor, " m"], others: Int[Tensor, " m"], mirrored: Bool[Tensor, " m"]
    ) -> Float[Tensor, " m"]:
        """Distances between images, the first of each pair mirrored or not: 0 for copies, exactly."""
        found = [torch.empty(0, dtype=torch.float64)]
        for one, other, swap in zip(
            ids.split(_BLOCK), others.split(_BLOCK), mirrored.split(_BLOCK), strict=True
        ):
            mine = self.rows.gather(one).float()
            mine[swap] = self._mirror(mine[swap])
            squares = mine.sub_(self.rows.gather(other)).square_().sum(1, dtype=torch.float64)
            found.append(squares.sqrt() / self.rows.codec.unit)
        return torch.cat(found)

    def _log_sums(self, terms: Float[Tensor, "B n"]) -> Float[Tensor, " b"]:
        """Logarithms of the sums over the images and the mirror images, float64."""
        return terms.sum(1).double().view(self.ways, -1).sum(0).clamp_min(1e-38).log()

    def _mirror(self, x: Float[Tensor, "m D"]) -> Float[Tensor, "m D"]:
        return x.view(len(x), *self.shape).flip(-1).flatten(1)


def _rounding(ratio: Float[Tensor, " b"], rank: int) -> Float[Tensor, " b"]:
    """How much too large a squared distance can come out, relative; `ratio` is |z| / distance.

    |z_j| <= |z| + d. Each coordinate is off by at most half a unit, a 64,516th of the largest, so the
    distance by sqrt(rank) times that share of |z| + |z_j|; float32 adds 2^-20 of (|z| + |z_j|)^2.
    """
    both = 2 * ratio + 1
    return 2 * rank**0.5 / 64_516 * both + 2**-20 * both.square()


def write_settling(store: ImageStore, times: Float[Tensor, " n"]) -> None:
    """Keeps the settling times of all images of `store` in its folder.

    Raises:
        StoreError: the folder cannot be written.
    """
    with whole_file(store.folder / SETTLING) as partial, partial.open("wb") as file:
        np.savez(file, format=FORMAT, store=store.fingerprint, times=times.numpy())


def read_settling(store: ImageStore) -> Float[Tensor, " n"] | None:
    """What `write_settling` kept; None where nothing is.

    Raises:
        StoreError: not readable, of another version, or of other images.
    """
    path = store.folder / SETTLING
    again = f"remove it, or run: nnflow calibrate {quoted(store.folder)}"
    if not path.exists():
        return None
    try:
        # Opened here: numpy leaves a file open that it cannot read.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            version, of, times = str(held["format"]), str(held["store"]), held["times"]
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(f"{shown(path)}: not readable settling times ({shown(error)}); {again}") from error
    if version != FORMAT:
        raise StoreError(f"{shown(path)}: format {shown(version)}, wanted {FORMAT}; {again}")
    if of != store.fingerprint or times.shape != (len(store),) or times.dtype != np.float32:
        raise StoreError(f"{shown(path)}: settling times of other images; {again}")
    return torch.from_numpy(times)
