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

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nnflow.errors import StoreError
from nnflow.files import shown, whole_file

FORMAT = "nnflow-embedding-3"


@dataclass(frozen=True)
class Embedding:
    """The affine map x -> P (x - mean), or x -> x - mean when `directions` is None.

    Attributes:
        mean: of all stored images, in [-1, 1].
        principal: R x D with orthonormal rows, leading first.
        searched: how many of them an index searches; None for one that searches the pixels, unrotated.
        spectrum: variances along the principal directions, then of the rest, all D of them.
        peaks: no stored image's |z_ij| is larger, along each of the R.
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
