"""Fits the PCA of the stored images, in passes over them that a killed build goes on with.

The covariance is summed exactly, in integers, so that neither the blocks nor a kill between them change a
bit of it. Where it would not fit, for its size or the budget, a random subset of the images gives the
directions.

Axes:  n images   D = C*H*W values of one image   R principal directions kept   m images of a subset
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from nnflow import integers
from nnflow.embedding import Embedding
from nnflow.errors import BudgetError, DegradedWarning, InputError
from nnflow.memory import format_bytes
from nnflow.pixels import HALF_RANGE, PixelRows
from nnflow.store import ImageStore
from nnflow.unfinished import Unfinished

# Directions kept for the far field, where there are as many. They hold 98.4 % of the variance of CIFAR-10;
# with 100 images in pixels that leaves 0.7 % of error at the worst time (p99 of 256 queries).
PRINCIPAL = 512

# Beyond this the D x D covariance is not formed: at D = 4,096 its eigenvectors take 7 s on 2 cores and
# the work grows as D^3. A random subset of images then spans the leading directions.
_MAX_COVARIANCE_DIM = 4096
_SUBSET = 4096  # images of that subset
_INTEGER_DIM = 64
_EXACT_ROWS = 1024  # rows whose int8 products sum within the 2^24 up to which float32 holds every integer
_GRAM_ROWS = 32_768  # at most 131,071, whose int8 products (at most 2^14 each) sum within int32


@dataclass(frozen=True)
class Fitting:
    """What a budget decides about a fit; two equal ones give the same embedding on one machine.

    Attributes:
        block: images of a block of float32.
        images: whose covariance gives the directions.
        together: images of a block of the covariance; None where a subset's inner products are taken instead.
    """

    block: int
    images: int
    together: int | None


def fitting_of(store: ImageStore, budget: int) -> Fitting:
    """How the images of `store` are fitted within `budget` bytes.

    Raises:
        InputError: a budget that no fit can keep.
    """
    count, dim = store.pixels.shape
    block = PixelRows(store.pixels).block_rows(budget)
    # the float64 sum, then its centred copy, eigenvectors and their workspace
    if dim <= _MAX_COVARIANCE_DIM and 36 * dim**2 <= budget:
        # beside the sum, the int32 product and their rounding up: the block, its transpose, its file's pages
        room = max(256, (budget - 16 * dim**2) // (4 * dim))
        return Fitting(block, count, min(_GRAM_ROWS, room, count))
    return Fitting(block, min(_SUBSET, _affordable(dim, budget), count), None)


def _affordable(dim: int, budget: int) -> int:
    """Images of a subset: float32 rows, their products, the directions; and float64 matrices of m x m."""
    images = min(budget // (24 * dim), max(512, math.isqrt(budget // 40)))
    if images < 256:
        least = 256 * 24 * dim
        raise BudgetError(
            f"memory budget of {format_bytes(budget)} is too small to fit {dim} values on at least 256 "
            f"images; give {format_bytes(least)}",
            least=least,
        )
    return images


def fit_embedding(
    store: ImageStore,
    *,
    rank: int | Literal["pixels"],
    budget: int,
    seed: int = 0,
    progress: bool = False,
    kept: Unfinished | None = None,
) -> Embedding:
    """PCA of all images of `store` within `budget` bytes.

    Args:
        store: the images.
        rank: coordinates to keep, clamped to D and n; "pixels" keeps all D without rotating.
        budget: bytes of working memory; below 36 D^2 a subset of the images is fitted, with a
            `DegradedWarning`.
        seed: of the random subset, which is used above D = 4,096 too.
        progress: show bars on stderr.
        kept: keeps what is done, and may hold what a build of the same `fitting_of`, images, rank and seed
            did before.

    Raises:
        InputError: a rank below 1, or a budget that no fit can keep.
    """
    if rank != "pixels" and rank < 1:
        raise InputError(f"rank {rank}: wanted at least 1, or 'pixels' for no projection")
    stream = _Stream(PixelRows(store.pixels), budget, fitting_of(store, budget), kept, progress)
    if stream.fitting.together is None and stream.rows.dim <= _MAX_COVARIANCE_DIM:
        warnings.warn(
            f"memory budget of {format_bytes(budget)}: the covariance of {stream.rows.dim} values takes "
            f"{format_bytes(36 * stream.rows.dim**2)}, so the directions are those of "
            f"{stream.fitting.images} of {len(store)} images",
            DegradedWarning,
            stacklevel=2,
        )
    axes = _axes(stream, rank, seed)
    found = _measure(stream, axes.mean, axes.principal, axes.searched)
    return Embedding(
        axes.mean,
        axes.principal,
        axes.searched,
        _complete(axes.spectrum, len(axes.principal), found.variance, stream.rows.dim).float(),
        found.peaks,
        found.radius,
        found.residual_radius,
        stream.fitting.images,
        store.fingerprint,
    )


@dataclass(frozen=True)
class _Stream:
    """The images, how they are read, and where what is known of them is kept."""

    rows: PixelRows
    budget: int
    fitting: Fitting
    kept: Unfinished | None
    progress: bool

    def summed(
        self,
        name: str,
        step: int,
        sums: dict[str, Tensor],
        add: Callable[[dict[str, Tensor], int, int], None],
    ) -> dict[str, Tensor]:
        """`sums` after `add(sums, start, stop)` of all rows, or of those that no killed build had added."""
        found = self.kept.find_tensors(name) if self.kept else None
        done = 0
        if found is not None:
            done, sums = int(found.pop("done")), found
        total = -(-self.rows.count // step)
        bar = tqdm(
            range(done, self.rows.count, step),
            name,
            initial=done // step,
            total=total,
            disable=not self.progress,
            unit="block",
        )
        for start in bar:
            stop = min(start + step, self.rows.count)
            add(sums, start, stop)
            self.rows.let_go(self.budget, start, stop)
            if self.kept and self.kept.due and stop < self.rows.count:
                self.kept.keep_tensors(name, sums | {"done": torch.tensor(stop)})
        return sums


@dataclass(frozen=True)
class _Axes:
    """The map, before it is known how far the images reach along it."""

    mean: Float[Tensor, " D"]
    principal: Float[Tensor, "R D"]
    searched: int | None
    spectrum: Float[Tensor, " s"]


def _axes(stream: _Stream, rank: int | Literal["pixels"], seed: int) -> _Axes:
    """Mean and directions: found, or as a killed build had found them."""
    held = stream.kept.find_tensors("axes") if stream.kept else None
    if held is not None:
        searched = int(held["searched"]) or None
        return _Axes(held["mean"], held["principal"], searched, held["spectrum"])
    rows = stream.rows
    if stream.fitting.together is not None:
        mean, covariance = _covariance(stream, stream.fitting.together)
        spectrum, directions = _leading(covariance)
    else:
        mean, spectrum, directions = _subset_directions(stream, seed)
    searched = None if rank == "pixels" else min(rank, rows.count, len(directions))
    principal = directions[: min(max(searched or 0, PRINCIPAL), rows.count)].float().contiguous()
    if stream.fitting.images < rows.count:
        spectrum, principal = _measured(stream, mean.float(), spectrum, principal)
    axes = _Axes(mean.float(), principal, searched, spectrum)
    if stream.kept:
        found = {"mean": axes.mean, "principal": principal, "spectrum": spectrum}
        stream.kept.keep_tensors("axes", found | {"searched": torch.tensor(searched or 0)})
        stream.kept.forget("covariance", "subset", "variances")
    return axes


def _subset_directions(stream: _Stream, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of all images, and the eigenpairs of a subset's covariance."""
    held = stream.kept.find_tensors("subset") if stream.kept else None
    if held is not None:
        return held["mean"], held["spectrum"], held["directions"]
    mean = _mean(stream)
    chosen = _subset(stream.rows.count, stream.fitting.images, seed)
    spectrum, directions = _subset_pca(stream, mean, chosen)
    if stream.kept:
        found = {"mean": mean, "spectrum": spectrum, "directions": directions}
        stream.kept.keep_tensors("subset", found)
        stream.kept.forget("mean")
    return mean, spectrum, directions


def _mean(stream: _Stream) -> Float[Tensor, " D"]:
    rows, room = stream.rows, stream.rows.new_block(stream.fitting.block)

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        # at most 1,024 * 255 in a float32 sum: exact
        sums["total"] += rows.read(start, stop, room).sum(0)

    none = {"total": torch.zeros(rows.dim, dtype=torch.float64)}
    total = stream.summed("mean", stream.fitting.block, none, add)["total"]
    return total / rows.count / HALF_RANGE - 1


def _covariance(stream: _Stream, step: int) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Mean and exact covariance in float64, from integer products where torch has them.

    Pixels minus 128 are exact in int8 and their products exact in int32: 0.09 s for 8,192 rows of 3,072
    values on 2 cores, against 0.80 s in float32.
    """
    rows = stream.rows

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        block = (rows.pixels[start:stop] ^ 128).view(torch.int8)
        sums["gram"] += _integer_gram(block)
        for some in block.split(_EXACT_ROWS):
            sums["total"] += some.float().sum(0) + 128 * len(some)

    none = {
        "gram": torch.zeros(rows.dim, rows.dim, dtype=torch.float64),
        "total": torch.zeros(rows.dim, dtype=torch.float64),
    }
    sums = stream.summed("covariance", step, none, add)
    mean = sums["total"] / rows.count / HALF_RANGE - 1
    centre = (mean + 1) * HALF_RANGE - 128
    gram = sums["gram"].div_(rows.count).sub_(torch.outer(centre, centre))
    return mean, gram.div_(HALF_RANGE**2)


def _integer_gram(block: Int[Tensor, "R D"]) -> Tensor:
    """B'B, exact. torch._int_mm of torch 2.13 is wrong for a single column; small ones need no haste."""
    if block.shape[1] >= _INTEGER_DIM and integers.are_fast():
        return torch._int_mm(block.T.contiguous(), block)
    gram = torch.zeros(block.shape[1], block.shape[1], dtype=torch.float64)
    for rows in block.split(_EXACT_ROWS):
        wide = rows.float()
        gram += wide.T @ wide
    return gram


def _leading(covariance: Float[Tensor, "D D"]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors as rows, each with its largest entry positive."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp_min(0), _signed(vectors.flip(1).T)


def _signed(directions: Float[Tensor, "r D"]) -> Float[Tensor, "r D"]:
    """The sign of an eigenvector is the library's whim; fixing it makes builds comparable."""
    at = directions.abs().argmax(1, keepdim=True)
    return directions * directions.gather(1, at).sign()


def _subset(count: int, size: int, seed: int) -> Int[Tensor, " m"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:size].sort().values


def _subset_pca(
    stream: _Stream, mean: Float[Tensor, " D"], chosen: Int[Tensor, " m"]
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the covariance of m images, through their m x m inner products."""
    centred = stream.rows.gather(chosen, stream.budget).float().div_(HALF_RANGE).sub_((1 + mean).float())
    values, vectors = torch.linalg.eigh((centred @ centred.T).double() / len(chosen))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = values > values[0] * 1e-6  # beyond, a direction is rounding
    kept[0] = True  # images all alike have no direction, and any will do
    directions = vectors[:, kept].T.float() @ centred
    return values[kept], _signed(torch.linalg.qr(directions.T)[0].T)


@dataclass(frozen=True)
class _Extent:
    """How far the images reach: total variance, largest |z_ij|, largest distances from the mean.

    The two distances are bounds: what float32 rounds away is added.
    """

    variance: float
    peaks: Float[Tensor, " R"]
    radius: float
    residual_radius: float


def _measure(
    stream: _Stream, mean: Float[Tensor, " D"], principal: Float[Tensor, "R D"], searched: int | None
) -> _Extent:
    rows, room = stream.rows, stream.rows.new_block(stream.fitting.block)

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        x = rows.read(start, stop, room).div_(HALF_RANGE).sub_(1 + mean)
        whole = x.square().sum(1, dtype=torch.float64)
        sums["total"] += whole.sum()
        sums["square"] = torch.maximum(sums["square"], whole.max())
        z = x @ principal.T
        sums["peaks"] = torch.maximum(sums["peaks"], z.abs().amax(0))
        if searched is not None:
            # Not |x|^2 - |z|^2: where one direction holds nearly all, that falls short by 5e-7 |x|^2.
            outside = x.sub_(z[:, :searched] @ principal[:searched])
            squares = outside.square().sum(1, dtype=torch.float64)
            sums["outside"] = torch.maximum(sums["outside"], squares.max())

    none = {name: torch.zeros((), dtype=torch.float64) for name in ("total", "square", "outside")}
    sums = stream.summed("extent", stream.fitting.block, none | {"peaks": torch.zeros(len(principal))}, add)
    variance = sums["total"].item() / rows.count
    # Each value is rounded four times, by at most half an ulp of a number in [1, 2), and those outside
    # once for each direction.
    slack = math.sqrt(rows.dim) * 2**-22
    radius = math.sqrt(sums["square"].item()) + slack
    if searched is None:
        return _Extent(variance, sums["peaks"], radius, 0.0)
    slack += math.sqrt(searched) * 2**-23 * radius
    return _Extent(variance, sums["peaks"], radius, math.sqrt(sums["outside"].item()) + slack)


def _measured(stream: _Stream, mean: Tensor, spectrum: Tensor, principal: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of all images along the directions of some, those in the lead first.

    A subset's own are too large: its directions were chosen to be long in it.
    """
    rows, room = stream.rows, stream.rows.new_block(stream.fitting.block)

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        x = rows.read(start, stop, room).div_(HALF_RANGE).sub_(1 + mean)
        sums["squares"] += (x @ principal.T).square().sum(0)

    none = {"squares": torch.zeros(len(principal), dtype=torch.float64)}
    squares = stream.summed("variances", stream.fitting.block, none, add)["squares"]
    variances, order = (squares / rows.count).sort(descending=True)
    return torch.cat([variances, spectrum[len(principal) :]]), principal[order]


def _complete(spectrum: Tensor, known: int, total: float, dim: int) -> Float[Tensor, " D"]:
    """All D variances: the `known` first as they are, the others scaled to what is left of the total."""
    lead, rest = spectrum[:known], spectrum[known:dim]
    left = max(0.0, total - lead.sum().item())
    missing = dim - known - len(rest)
    if missing > 0:  # what a subset did not resolve
        rest = torch.cat([rest, rest.new_full((missing,), rest[-1].item() if len(rest) else 1.0)])
    return torch.cat([lead, rest * (left / rest.sum().clamp_min(1e-30))])
