"""ImageStore: a finite set of images as one memory-mapped array, with labels and names."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, Num, UInt8
from torch import Tensor

from nnflow import hdf5file
from nnflow.codec import BYTES, Codec, to_uint8
from nnflow.errors import InputError, StoreError
from nnflow.filemap import Written, mapped
from nnflow.files import folder_lock, shown
from nnflow.ingest import IMAGES, build_images, is_unfinished
from nnflow.pixels import PixelRows

__all__ = ["ImageStore", "to_float", "to_uint8"]


def to_float(pixels: UInt8[Tensor, "..."]) -> Float[Tensor, "..."]:
    """0 .. 255 to float32 in [-1, 1]."""
    return BYTES.values(pixels)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStore:
    """n images of one shape, stored by class; made by `build`, reopened by `open`.

    Pixels are read from the file as they are needed: in memory are only labels and paths.
    """

    folder: Path
    shape: tuple[int, int, int, int]  # n, C, H, W
    labels: Int[Tensor, " n"]  # int64, ascending; -1 everywhere when the source has no classes
    classes: tuple[str, ...]  # sorted names; () when none
    paths: Sequence[str]  # of the n images within their source
    fingerprint: str  # of pixels, labels, classes and shape
    pixels: Num[Tensor, "n D"]  # D = C*H*W; a read-only map of the file: writing to it crashes
    codec: Codec = BYTES  # what the stored numbers stand for
    written: Written | None = None  # when the file was, as it was opened; None in memory

    @classmethod
    def build(
        cls,
        source: Path | str,
        path: Path | str,
        *,
        size: int | None = None,
        grey: bool = False,
        background: str = "white",
        scaling: float | None = None,
        workers: int | None = None,
        skip_unreadable: bool = False,
        progress: bool = False,
        limit: int | None = None,
        classes: Sequence[str] | None = None,
        seed: int = 0,
    ) -> "ImageStore":
        """The images of `source` in the folder `path`: built, finished after a kill, or reused.

        Arguments and errors are those of `ingest.build_images`.

        Raises:
            BusyError: another process is building in `path`.
        """
        with folder_lock(Path(path)):
            build_images(
                source,
                path,
                size=size,
                grey=grey,
                background=background,
                scaling=scaling,
                workers=workers,
                skip_unreadable=skip_unreadable,
                progress=progress,
                limit=limit,
                classes=classes,
                seed=seed,
            )
            return cls.open(path)

    @classmethod
    def open(cls, path: Path | str) -> "ImageStore":
        """The store in the folder `path`, or at its images.h5.

        Raises:
            StoreError: missing, unfinished, truncated, foreign, or of another version.
        """
        path = Path(path)
        if path.is_dir():
            path = path / IMAGES
            if is_unfinished(path.parent):
                raise StoreError(f"{shown(path.parent)}: its build has not finished; repeat its command")
        header, written = hdf5file.read_header(path), Written.now(path)
        if not header.fingerprint or header.codec is None:
            raise StoreError(f"{shown(path)}: its build has not finished; repeat the command")
        held = mapped(path, header.pixels_at, (header.shape[0], header.row_bytes))
        return cls(
            folder=path.parent,
            shape=header.shape,
            labels=torch.from_numpy(header.labels),
            classes=header.classes,
            paths=header.paths,
            fingerprint=header.fingerprint,
            pixels=held.view(header.codec.dtype),
            written=written,
            codec=header.codec,
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        count, *shape = self.shape
        classes = len(self.classes)
        return f"ImageStore({shown(self.folder)}: {count} images {tuple(shape)}, {classes} classes)"

    def images(self, ids: Tensor) -> Float[Tensor, "B C H W"]:
        """Images `ids`, int64 (B,) in [0, n), as float32 (B, C, H, W) where `ids` is.

        Pixels are in [-1, 1], latents those of the source times `codec.scaling`.

        Raises:
            InputError: ids of another shape or type, or outside [0, n).
            StoreError: the file has been written to since it was opened.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype != torch.int64:
            got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise InputError(f"ids: wanted an int64 tensor of shape (B,), got {got}")
        rows = ids.cpu()
        low, high = (int(rows.min()), int(rows.max())) if len(rows) else (0, 0)
        if low < 0 or high >= len(self):
            raise InputError(f"ids from {low} to {high}: wanted 0 to {len(self) - 1}, the images stored")
        self.check_unchanged()
        chosen = self.rows().gather(rows).to(ids.device)
        return self.codec.values(chosen).reshape(len(rows), *self.shape[1:])

    def check_unchanged(self) -> None:
        """Refuses images whose file has been written to under this map of it: 2 us.

        Raises:
            StoreError: naming the file.
        """
        if self.written is not None:
            self.written.check()

    def refuse_latents(self, what: str) -> None:
        """Refuses latents for what reads pixels.

        Raises:
            InputError: the store holds latents.
        """
        if not self.codec.of_pixels:
            raise InputError(
                f"{what}: of pixels only, {shown(self.folder)} holds latents; index the images themselves"
            )

    def refuse_flip(self, flip: bool) -> None:
        """Refuses mirror images of latents: an autoencoder's latent of a mirrored image is another.

        Raises:
            InputError: `flip`, and the store holds latents.
        """
        if flip and not self.codec.of_pixels:
            raise InputError(
                "flip: a mirrored latent is not the latent of the mirrored image; leave it out (--no-flip), "
                "or encode the mirrored images as well"
            )

    def refuse_other_units(self, other: "ImageStore", what: str) -> None:
        """Refuses images whose numbers stand for other values, such as latents of another scaling.

        Raises:
            InputError: naming the scalings.
        """
        if (self.codec.unit, self.codec.offset) != (other.codec.unit, other.codec.offset):
            raise InputError(
                f"{what} are {_told(other.codec)}, the images indexed {_told(self.codec)}: build both from "
                f"the same kind of source, latents with one scaling (--scaling {self.codec.scaling:.9g})"
            )

    def rows(self, device: torch.device | str = "cpu") -> PixelRows:
        """The images as fields and fits read them."""
        return PixelRows(self.pixels, device, codec=self.codec)

    def class_rows(self, label: int) -> slice:
        """The rows of class `label`: images of one class are stored together.

        Raises:
            InputError: no such class.
        """
        if not 0 <= label < len(self.classes):
            known = f"0 to {len(self.classes) - 1}" if self.classes else "of which there are none"
            raise InputError(f"label {label}: wanted one of the stored classes, {known}")
        ends = torch.searchsorted(self.labels, torch.tensor([label, label + 1])).tolist()
        return slice(*ends)


def _told(codec: Codec) -> str:
    return "pixels" if codec.of_pixels else f"latents times {codec.scaling:.6g}"
