"""PCA of the stored images: the few coordinates in which neighbours are searched and far images summed.

    z_i = P (x_i - mean),   P: R x D with orthonormal rows, the leading eigenvectors of the covariance

The first `rank` of them are searched by faiss, all R are the far field's. The whole spectrum is kept, not
only the leading part: the collapse time (docs/field.md, section 6) and every statement on what a rank
leaves out need it.

Axes:  n images   D = C*H*W values of one image   r = rank   R >= r principal directions kept
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from nnflow import integers
from nnflow.errors import InputError, StoreError
from nnflow.files import shown, whole_file
from nnflow.memory import format_bytes
from nnflow.pixels import HALF_RANGE, PixelRows
from nnflow.store import ImageStore

FORMAT = "nnflow-embedding-3"

# Directions kept for the far field, where there are as many. They hold 98.4 % of the variance of CIFAR-10;
# with 100 images in pixels that leaves 0.7 % of error at the worst time (p99 of 256 queries).
PRINCIPAL = 512

# Beyond this the D x D covariance is not formed: at D = 4,096 its eigenvectors take 7 s on 2 cores and
# the work grows as D^3. A random subset of images then spans the leading directions.
_MAX_COVARIANCE_DIM = 4096
_SUBSET = 4096  # images of that subset
_INTEGER_DIM = 64
_EXACT_ROWS = 1024  # rows whose int8 products sum within the 2^24 up to which float32 holds every integer
_GRAM_ROWS = 65_536  # rows whose int8 products (at most 2^14 each) sum within int32


@dataclass(frozen=True)
class Embedding:
    """The affine map x -> P (x - mean), or x -> x - mean when `directions` is None.

    Attributes:
        mean: of all stored images, in [-1, 1].
        principal: R x D with orthonormal rows, leading first.
        searched: how many of them an index searches; None for one that searches the pixels, unrotated.
        spectrum: variances along the principal directions, then of the rest, all D of them.
        peaks: the largest |z_ij| of any stored image, along each of the R.
        radius: no stored image is further from the mean than this (L2).
        residual_radius: the same of the part of the images outside the directions searched.
        fitted_on: images whose covariance gave the directions.
        store_fingerprint: of the store it was fitted on.
    """

    mean: Float[Tensor, " D"]
    principal: Float[Tensor, "R D"]
    searched: int | None
    spectrum: Float[Tensor, " D"]
    peaks: Float[Tensor, " R"]
    radius: float
    residual_radius: float
    fitted_on: int
    store_fingerprint: str

    @property
    def directions(self) -> Float[Tensor, "r D"] | None:
        """The directions searched; None keeps every pixel."""
        return None if self.searched is None else self.principal[: self.searched]

    @property
    def rank(self) -> int:
        """Coordinates that are searched."""
        return len(self.mean) if self.searched is None else self.searched

    @property
    def captured(self) -> float:
        """Share of the variance that the coordinates hold, in [0, 1]."""
        total = self.spectrum.sum().item()
        return self.spectrum[: self.rank].sum().item() / total if total > 0 else 1.0

    def __call__(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B r"]:
        """Coordinates of x (values in [-1, 1] units, not necessarily within)."""
        centred = x - self.mean.to(x.device)
        return centred if self.directions is None else centred @ self.directions.T.to(x.device)

    def project(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B R"]:
        """All principal coordinates of x."""
        return (x - self.mean) @ self.principal.T

    def reach(self, mean: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Upper bound on the distance from `mean` to the furthest stored image, float64."""
        return self.radius + torch.linalg.vector_norm(mean - self.mean, dim=1).double()

    def to(self, device: torch.device) -> "Embedding":
        """The same map on another device."""
        on = {name: getattr(self, name).to(device) for name in ("mean", "principal", "peaks")}
        return replace(self, **on)

    def save(self, path: Path) -> None:
        """Writes all of it to `path` as safetensors; the same embedding gives the same bytes."""
        tensors = {
            "mean": self.mean,
            "spectrum": self.spectrum,
            "principal": self.principal.contiguous(),
            "peaks": self.peaks,
        }
        numbers = torch.tensor(
            [self.radius, self.residual_radius, self.fitted_on, self.searched or 0], dtype=torch.float64
        )
        # As a tensor, because safetensors writes several entries of metadata in an order of its own.
        name = torch.frombuffer(bytearray(self.store_fingerprint, "utf-8"), dtype=torch.uint8)
        with whole_file(path) as partial:
            partial.write_bytes(save(tensors | {"numbers": numbers, "store": name}, {"format": FORMAT}))

    @classmethod
    def open(cls, path: Path) -> "Embedding":
        """Reads what `save` wrote.

        Raises:
            StoreError: absent, truncated, or another kind of file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{shown(path)}: not a readable embedding ({shown(error)}); build the index again"
            ) from error
        if metadata.get("format") != FORMAT:
            raise StoreError(
                f"{shown(path)}: format {shown(metadata.get('format'))}, wanted {FORMAT}; "
                "build the index again with this version"
            )
        if not _fit_each_other(tensors):
            raise StoreError(
                f"{shown(path)}: wanted mean, spectrum, principal, peaks, numbers and store that fit each "
                "other; build the index again"
            )
        radius, residual, fitted_on, searched = tensors["numbers"].tolist()
        return cls(
            tensors["mean"],
            tensors["principal"],
            int(searched) or None,
            tensors["spectrum"],
            tensors["peaks"],
            radius,
            residual,
            int(fitted_on),
            bytes(tensors["store"].tolist()).decode(errors="replace"),
        )


def fit_embedding(
    store: ImageStore,
    *,
    rank: int | Literal["pixels"],
    budget: int,
    seed: int = 0,
    progress: bool = False,
) -> Embedding:
    """PCA of all images of `store` within `budget` bytes (plus the D x D covariance it states).

    Args:
        store: the images.
        rank: coordinates to keep, clamped to D and n; "pixels" keeps all D without rotating.
        budget: bytes of working memory.
        seed: of the random subset used when D is above 4,096.
        progress: show a bar on stderr.

    Raises:
        InputError: a rank below 1, or a budget that the fit cannot keep.
    """
    if rank != "pixels" and rank < 1:
        raise InputError(f"rank {rank}: wanted at least 1, or 'pixels' for no projection")
    rows = PixelRows(store.pixels)
    mean = _mean(rows, budget)
    if rows.dim <= _MAX_COVARIANCE_DIM:
        # int8 block and its transpose, the int32 product, the float64 sum, eigenvectors, workspace
        need = 36 * rows.dim**2
        if need > budget:
            raise InputError(
                f"memory budget of {format_bytes(budget)} is too small for the covariance of "
                f"{rows.dim} values: it takes {format_bytes(need)}; give at least that"
            )
        covariance = _covariance(rows, mean, budget, progress)
        spectrum, directions = _leading(covariance)
        fitted_on = rows.count
    else:
        chosen = _subset(rows.count, min(_SUBSET, _affordable(rows.dim, budget)), seed)
        spectrum, directions = _subset_pca(rows, mean, chosen)
        fitted_on = len(chosen)
    searched = None if rank == "pixels" else min(rank, rows.count, len(directions))
    principal = directions[: min(max(searched or 0, PRINCIPAL), rows.count)].float().contiguous()
    if fitted_on < rows.count:
        spectrum, principal = _measured(rows, mean.float(), spectrum, principal, budget)
    found = _measure(rows, mean.float(), principal, searched, budget)
    return Embedding(
        mean.float(),
        principal,
        searched,
        _complete(spectrum, len(principal), found.variance, rows.dim).float(),
        found.peaks,
        found.radius,
        found.residual_radius,
        fitted_on,
        store.fingerprint,
    )


def _mean(rows: PixelRows, budget: int) -> Float[Tensor, " D"]:
    total = torch.zeros(rows.dim, dtype=torch.float64)
    block = rows.new_block(rows.block_rows(budget))
    for start in range(0, rows.count, len(block)):
        # at most 1,024 * 255 in a float32 sum: exact
        total += rows.read(start, min(start + len(block), rows.count), block).sum(0)
    return total / rows.count / HALF_RANGE - 1


def _covariance(
    rows: PixelRows, mean: Float[Tensor, " D"], budget: int, progress: bool
) -> Float[Tensor, "D D"]:
    """Exact covariance in float64, from integer products where torch has them.

    Pixels minus 128 are exact in int8 and their products exact in int32: 0.09 s for 8,192 rows of 3,072
    values on 2 cores, against 0.80 s in float32.
    """
    room = max(256, (budget - 32 * rows.dim**2) // (6 * rows.dim))
    step = min(_GRAM_ROWS, room, rows.count)
    gram = torch.zeros(rows.dim, rows.dim, dtype=torch.float64)
    for start in tqdm(range(0, rows.count, step), "covariance", disable=not progress, unit="block"):
        block = (rows.pixels[start : start + step] ^ 128).view(torch.int8)
        gram += _integer_gram(block)
    centre = (mean + 1) * HALF_RANGE - 128
    return (gram / rows.count - torch.outer(centre, centre)) / HALF_RANGE**2


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


def _affordable(dim: int, budget: int) -> int:
    images = budget // (24 * dim)  # float32 rows, their float64 products, the directions
    if images < 256:
        raise InputError(
            f"memory budget of {format_bytes(budget)} is too small to fit {dim} values on at least 256 "
            f"images; give {format_bytes(256 * 24 * dim)}"
        )
    return images


def _subset(count: int, size: int, seed: int) -> Int[Tensor, " m"]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:size].sort().values


def _subset_pca(
    rows: PixelRows, mean: Float[Tensor, " D"], chosen: Int[Tensor, " m"]
) -> tuple[Tensor, Tensor]:
    """Eigenpairs of the covariance of m < D images, through their m x m inner products."""
    centred = rows.gather(chosen).float().div_(HALF_RANGE).sub_((1 + mean).float())
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
    rows: PixelRows,
    mean: Float[Tensor, " D"],
    principal: Float[Tensor, "R D"],
    searched: int | None,
    budget: int,
) -> _Extent:
    total = radius = residual = 0.0
    peaks = torch.zeros(len(principal))
    block = rows.new_block(rows.block_rows(budget))
    for start in range(0, rows.count, len(block)):
        x = rows.read(start, min(start + len(block), rows.count), block)
        x.div_(HALF_RANGE).sub_(1 + mean)
        whole = x.square().sum(1, dtype=torch.float64)
        total += whole.sum().item()
        radius = max(radius, whole.max().item())
        z = x @ principal.T
        peaks = torch.maximum(peaks, z.abs().amax(0))
        if searched is not None:
            # Not |x|^2 - |z|^2: where one direction holds nearly all, that falls short by 5e-7 |x|^2.
            outside = x.sub_(z[:, :searched] @ principal[:searched])
            residual = max(residual, outside.square().sum(1, dtype=torch.float64).max().item())
    # Each value is rounded four times, by at most half an ulp of a number in [1, 2), and those outside
    # once for each direction.
    slack = math.sqrt(rows.dim) * 2**-22
    radius = math.sqrt(radius) + slack
    if searched is None:
        return _Extent(total / rows.count, peaks, radius, 0.0)
    slack += math.sqrt(searched) * 2**-23 * radius
    return _Extent(total / rows.count, peaks, radius, math.sqrt(residual) + slack)


def _measured(
    rows: PixelRows, mean: Tensor, spectrum: Tensor, principal: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """Variances of all images along the directions of some, those in the lead first.

    A subset's own are too large: its directions were chosen to be long in it.
    """
    squares = torch.zeros(len(principal), dtype=torch.float64)
    block = rows.new_block(rows.block_rows(budget))
    for start in range(0, rows.count, len(block)):
        x = rows.read(start, min(start + len(block), rows.count), block)
        x.div_(HALF_RANGE).sub_(1 + mean)
        squares += (x @ principal.T).square().sum(0)
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


def _fit_each_other(tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of an embedding: all there, their shapes and types as saved."""
    if {"mean", "principal", "spectrum", "peaks", "numbers", "store"} - tensors.keys():
        return False
    mean, spectrum, numbers = tensors["mean"], tensors["spectrum"], tensors["numbers"]
    principal, peaks = tensors["principal"], tensors["peaks"]
    return (
        {mean.dtype, spectrum.dtype, principal.dtype, peaks.dtype} == {torch.float32}
        and mean.ndim == 1
        and spectrum.shape == mean.shape
        and principal.ndim == 2
        and principal.shape[1] == len(mean)
        and peaks.shape == (len(principal),)
        and bool(peaks.isfinite().all())
        and numbers.shape == (4,)
        and tensors["store"].dtype == torch.uint8
        and tensors["store"].ndim == 1
        and bool(numbers.isfinite().all())
        and max(1.0, numbers[3].item()) <= len(principal)
    )


def collapse_time(spectrum: Float[Tensor, " D"], count: int) -> float:
    """Time at which half the mass of u* is expected on one image, were the images Gaussian.

    A query on the path carries I(s) = 1/2 sum_j log(1 + v_j / s^2) nats about its image, s = (1-t)/t; the
    sum collapses when I reaches log n (docs/field.md, section 6; the condensation argument of Biroli et
    al. 2024, arXiv 2402.18491). Real images deviate: an estimate, not a bound.
    """
    values, goal = spectrum.double(), math.log(max(count, 1))
    low, high = 0.0, 1.0
    for _ in range(40):  # halves to 1e-12
        t = (low + high) / 2
        nats = 0.5 * torch.log1p(values * (t / (1 - t)) ** 2).sum().item()
        low, high = (t, high) if nats < goal else (low, t)
    return (low + high) / 2


def embedding_digest(embedding: Embedding) -> str:
    """Digest of the map, so that an index can say which embedding its vectors came from."""
    digest = hashlib.blake2b(embedding.store_fingerprint.encode(), digest_size=16)
    for part in (embedding.mean, embedding.principal.contiguous()):
        digest.update(part.numpy().tobytes())
    digest.update(str(embedding.searched).encode())
    return digest.hexdigest()
