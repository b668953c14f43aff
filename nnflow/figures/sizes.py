"""One set of images at several sizes: from their source, or from a store by making its images smaller.

Never larger: an enlarged image has no more directions than the original, and would move every curve.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from nnflow.decode import image_size
from nnflow.figures.parts import Parts
from nnflow.filemap import mapped
from nnflow.files import disk_errors, shown, whole_file
from nnflow.sources import open_source
from nnflow.store import ImageStore

STEPS = (8, 16, 32, 64, 128, 256)  # the paper's
_BLOCK = 256  # images resized at once
_PIXELS = "pixels.bin"


@dataclass(frozen=True, kw_only=True)
class Originals:
    """Where the images of all sizes come from.

    Attributes:
        source: read again at every size; None for those of `store`.
        store: stored images, made smaller; None for a `source`.
        limit: images taken of a source, drawn by `seed`; None for all.
        seed: of that draw.
        fingerprint: of the source's listing, or of the store.
        count: images in all.
        smallest: the shorter side of the smallest of them, in pixels.
        example: its name.
    """

    source: Path | None
    store: ImageStore | None
    limit: int | None
    seed: int
    fingerprint: str
    count: int
    smallest: int
    example: str

    @property
    def resampling(self) -> str:
        """How sizes are made, for captions."""
        if self.store is None:
            return "LANCZOS from the originals, as nnflow index does"
        side = self.store.shape[-1]
        return f"LANCZOS from the stored images of {side} \N{MULTIPLICATION SIGN} {side}"

    def too_large(self, size: int) -> str | None:
        """What keeps them from being had at `size`; None where nothing does."""
        if size <= self.smallest:
            return None
        whose = f"{shown(self.example)} is" if self.store is None else "the stored images are"
        return (
            f"size {size}: {whose} {self.smallest} pixels on the shorter side, and images are not enlarged; "
            f"wanted sizes up to {self.smallest}"
        )

    def at(self, size: int, parts: Parts, *, progress: bool = False) -> ImageStore:
        """The images at `size` by `size`, made in a folder of `parts` or found there."""
        key = {"images": self.fingerprint, "limit": self.limit, "seed": self.seed, "size": size}
        place = parts.place(f"images-{size}", key)
        if self.source is not None:
            return ImageStore.build(
                self.source, place, size=size, limit=self.limit, seed=self.seed, progress=progress
            )
        assert self.store is not None
        return self.store if size == self.store.shape[-1] else smaller(self.store, size, place)


def originals_of_source(source: Path, parts: Parts, *, limit: int | None, seed: int) -> Originals:
    """The images at `source`, whose heads are all read once.

    Raises:
        SourceError: no images there, or one that cannot be read.
    """
    with open_source(source, limit=limit, seed=seed) as images:

        def measured() -> dict[str, object]:
            best, name = 0, ""
            for item in images.items:
                side = min(image_size(images.read(item), item.path))
                if not name or side < best:
                    best, name = side, item.path
            return {"smallest": best, "example": shown(name)}

        found = parts.get("originals", {"source": images.digest}, measured)
        return Originals(
            source=source,
            store=None,
            limit=limit,
            seed=seed,
            fingerprint=images.digest,
            count=len(images.items),
            smallest=found["smallest"],
            example=found["example"],
        )


def originals_of_store(store: ImageStore) -> Originals:
    """The images of `store`, all of one size."""
    return Originals(
        source=None,
        store=store,
        limit=None,
        seed=0,
        fingerprint=store.fingerprint,
        count=len(store),
        smallest=min(store.shape[2:]),
        example="",
    )


def smaller(store: ImageStore, size: int, place: Path) -> ImageStore:
    """The images of `store` at `size` by `size`, their pixels in a file at `place`; whole or not there."""
    count, channels = store.shape[:2]
    path = place / _PIXELS
    if not path.exists():
        with disk_errors(place, "creating"):
            place.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:
            for start in range(0, count, _BLOCK):
                block = store.pixels[start : start + _BLOCK].reshape(-1, *store.shape[1:])
                file.write(np.stack([_resized(image, size) for image in block.numpy()]).tobytes())
    return ImageStore(
        folder=place,
        shape=(count, channels, size, size),
        labels=store.labels,
        classes=store.classes,
        paths=store.paths,
        fingerprint=f"{store.fingerprint}-lanczos-{size}",
        pixels=mapped(path, 0, (count, channels * size * size)),
    )


def _resized(image: UInt8[np.ndarray, "C H W"], size: int) -> UInt8[np.ndarray, "C s s"]:
    array = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    small = np.asarray(Image.fromarray(array).resize((size, size), Image.Resampling.LANCZOS))
    return small[None] if small.ndim == 2 else small.transpose(2, 0, 1)
