"""Fits the PCA of the stored images, in passes over them that a killed build goes on with.

The whole covariance gives the directions (`covariance`), or the inner products of images that are few for
their values. Where neither would fit, for its size or the budget, those of a random subset of the images do.

Axes:  n images   D = C*H*W values of one image   R principal directions kept   m images of a subset
"""

import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnflow.covariance import Fitting, Stream, covariance_of, mean_of
from nnflow.embedding import Embedding
from nnflow.errors import BudgetError, DegradedWarning, InputError
from nnflow.memory import format_bytes
from nnflow.projection import Projection, centred
from nnflow.store import ImageStore
from nnflow.unfinished import Unfinished

# Directions kept for the far field, where there are as many. They hold 98.4 % of the variance of CIFAR-10;
# with 100 images in pixels that leaves 0.7 % of error at the worst time (p99 of 256 queries). Where they hold
# less than this share, twice as many are kept: of photos at 64 x 64 they hold 91 %.
PRINCIPAL = 512
_ENOUGH = 0.97

# Beyond this the D x D covariance is not formed: at D = 4,096 its eigenvectors take 7 s on 2 cores and
# the work grows as D^3. A random subset of images then spans the leading directions.
_MAX_COVARIANCE_DIM = 4096
_SUBSET = 4096  # images of that subset
# Of this many values on, inner products of up to half as many images are quicker: they take all of 1,000
# images of 3,072 values in 0.4 s on 2 cores, the covariance 3.7 s. Below, either is done in 0.3 s.
_MIN_PRODUCTS_DIM = 1024
_GRAM_ROWS = 32_768  # at most 131,071, whose int8 products (at most 2^14 each) sum within int32


def fitting_of(store: ImageStore, budget: int) -> Fitting:
    """How the images of `store` are fitted within `budget` bytes.

    Raises:
        InputError: a budget that no fit can keep.
    """
    count, dim = store.pixels.shape
    block = store.rows().cached_rows(budget)
    if dim >= _MIN_PRODUCTS_DIM and 2 * count <= dim and count <= min(_SUBSET, _affordable(dim, budget)):
        return Fitting(block, count, None)
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
    stream = Stream(store.rows(), budget, fitting_of(store, budget), kept, progress)
    if stream.fitting.images < len(store) and stream.rows.dim <= _MAX_COVARIANCE_DIM:
        warnings.warn(
            f"memory budget of {format_bytes(budget)}: the covariance of {stream.rows.dim} values takes "
            f"{format_bytes(36 * stream.rows.dim**2)}, so the directions are those of "
            f"{stream.fitting.images} of {len(store)} images",
            DegradedWarning,
            stacklevel=2,
        )
    axes = _axes(stream, rank, seed)
    unresolved = stream.fitting.images < len(store)
    found = _measure(stream, axes.mean, axes.principal, axes.searched)
    return Embedding(
        axes.mean,
        axes.principal,
        axes.searched,
        _complete(
            axes.spectrum, len(axes.principal), found.variance, stream.rows.dim, unresolved=unresolved
        ).float(),
        found.peaks,
        found.radius,
        found.residual_radius,
        stream.fitting.images,
        store.fingerprint,
    )


@dataclass(frozen=True)
class _Axes:
    """The map, before it is known how far the images reach along it."""

    mean: Float[Tensor, " D"]
    principal: Float[Tensor, "R D"]
    searched: int | None
    spectrum: Float[Tensor, " s"]


def _axes(stream: Stream, rank: int | Literal["pixels"], seed: int) -> _Axes:
    """Mean and directions: found, or as a killed build had found them."""
    held = stream.kept.find_tensors("axes") if stream.kept else None
    if held is not None:
        searched = int(held["searched"]) or None
        return _Axes(held["mean"], held["principal"], searched, held["spectrum"])
    rows = stream.rows
    if stream.fitting.together is not None:
        mean, covariance = covariance_of(stream, stream.fitting.together)
        spectrum, directions = _leading(covariance)
    else:
        mean, spectrum, directions = _subset_directions(stream, seed)
    searched = None if rank == "pixels" else min(rank, rows.count, len(directions))
    principal = directions[: min(max(searched or 0, _needed(spectrum)), rows.count)].float().contiguous()
    if stream.fitting.images < rows.count:
        spectrum, principal = _measured(stream, mean.float(), spectrum, principal)
    axes = _Axes(mean.float(), principal, searched, spectrum)
    if stream.kept:
        found = {"mean": axes.mean, "principal": principal, "spectrum": spectrum}
        stream.kept.keep_tensors("axes", found | {"searched": torch.tensor(searched or 0)})
        stream.kept.forget("covariance", "subset", "variances")
    return axes


def _needed(spectrum: Float[Tensor, " s"]) -> int:
    """`PRINCIPAL` directions, or twice as many where those hold too little."""
    enough = spectrum[:PRINCIPAL].sum() >= _ENOUGH * spectrum.sum()
    return PRINCIPAL if enough else 2 * PRINCIPAL


def _subset_directions(stream: Stream, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of all images, and the eigenpairs of a subset's covariance."""
    held = stream.kept.find_tensors("subset") if stream.kept else None
    if held is not None:
        return held["mean"], held["spectrum"], held["directions"]
    mean = mean_of(stream)
    chosen = _subset(stream.rows.count, stream.fitting.images, seed)
    spectrum, directions = _subset_pca(stream, mean, chosen)
    if stream.kept:
        found = {"mean": mean, "spectrum": spectrum, "directions": directions}
        stream.kept.keep_tensors("subset", found)
        stream.kept.forget("mean")
    return mean, spectrum, directions


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
    stream: Stream, mean: Float[Tensor, " D"], chosen: Int[Tensor, " m"]
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the covariance of m images, through their m x m inner products."""
    x = centred(stream.rows.gather(chosen, stream.budget).float(), stream.rows.codec, mean)
    values, vectors = torch.linalg.eigh((x @ x.T).double() / len(chosen))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    kept = values > values[0] * 1e-6  # beyond, a direction is rounding
    kept[0] = True  # images all alike have no direction, and any will do
    directions = vectors[:, kept].T.float() @ x
    return values[kept], _signed(torch.linalg.qr(directions.T)[0].T)


@dataclass(frozen=True)
class _Extent:
    """How far the images reach: total variance, largest |z_ij|, largest distances from the mean.

    All but the variance are bounds: what is rounded away is added.
    """

    variance: float
    peaks: Float[Tensor, " R"]
    radius: float
    residual_radius: float


def _measure(
    stream: Stream, mean: Float[Tensor, " D"], principal: Float[Tensor, "R D"], searched: int | None
) -> _Extent:
    rows, room = stream.rows, stream.rows.new_block(stream.fitting.block)
    project = Projection(mean, principal, rows.codec)
    error = project.errors[:searched].norm().item()

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        x = centred(rows.read(start, stop, room), rows.codec, mean)
        whole = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).square()
        sums["total"] += whole.sum()
        sums["square"] = torch.maximum(sums["square"], whole.max())
        z = project(rows.pixels[start:stop], x)
        sums["peaks"] = torch.maximum(sums["peaks"], z.abs().amax(0))
        if searched is not None:
            # |x|^2 - |z|^2 only says which images may be furthest, 3 of CIFAR-10's after the first block:
            # where one direction holds nearly all, it falls short by 5e-7 |x|^2.
            lead = z[:, :searched]
            at_most = whole * (1 + 2 * error) - lead.square().sum(1, dtype=torch.float64)
            far = at_most > sums["outside"]
            squares = (x[far] - lead[far] @ principal[:searched]).square().sum(1, dtype=torch.float64)
            sums["outside"] = torch.cat([squares, sums["outside"][None]]).max()

    none = {name: torch.zeros((), dtype=torch.float64) for name in ("total", "square", "outside")}
    sums = stream.summed("extent", stream.fitting.block, none | {"peaks": torch.zeros(len(principal))}, add)
    variance = sums["total"].item() / rows.count
    # Each value is rounded four times, by at most half an ulp of it or of its distance from the mean, and
    # those outside once for each direction.
    slack = rows.diameter * 2**-23
    radius = math.sqrt(sums["square"].item()) + slack
    peaks = sums["peaks"] + radius * project.errors
    if searched is None:
        return _Extent(variance, peaks, radius, 0.0)
    slack += math.sqrt(searched) * 2**-23 * radius
    return _Extent(variance, peaks, radius, math.sqrt(sums["outside"].item()) + slack)


def _measured(stream: Stream, mean: Tensor, spectrum: Tensor, principal: Tensor) -> tuple[Tensor, Tensor]:
    """Variances of all images along the directions of some, those in the lead first.

    A subset's own are too large: its directions were chosen to be long in it.
    """
    rows, project = stream.rows, Projection(mean, principal, stream.rows.codec)

    def add(sums: dict[str, Tensor], start: int, stop: int) -> None:
        sums["squares"] += project(rows.pixels[start:stop]).square().sum(0)

    none = {"squares": torch.zeros(len(principal), dtype=torch.float64)}
    squares = stream.summed("variances", stream.fitting.block, none, add)["squares"]
    variances, order = (squares / rows.count).sort(descending=True)
    return torch.cat([variances, spectrum[len(principal) :]]), principal[order]


def _complete(
    spectrum: Tensor, known: int, total: float, dim: int, *, unresolved: bool
) -> Float[Tensor, " D"]:
    """All D variances: the `known` first as they are, the others scaled to what is left of the total."""
    lead, rest = spectrum[:known], spectrum[known:dim]
    left = max(0.0, total - lead.sum().item())
    missing = dim - known - len(rest)
    if missing > 0:  # what a subset did not resolve; n images have n - 1 variances
        least = (rest[-1].item() if len(rest) else 1.0) if unresolved else 0.0
        rest = torch.cat([rest, rest.new_full((missing,), least)])
    return torch.cat([lead, rest * (left / rest.sum().clamp_min(1e-30))])
