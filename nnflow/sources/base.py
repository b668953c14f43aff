"""What every source of images is: items in a fixed order, read by any thread.

The order is (class, path) by code point, so that one class is one slice of a store, and neither the
file system nor the number of workers matters. How to read well may be another order: the rows of a
store go by class, a tar file is best read from front to back (`Source.reading_order`).
"""

import hashlib
import re
import stat
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int, Num, UInt8

from nnflow.errors import SourceError
from nnflow.files import shown
from nnflow.memory import format_bytes

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".pnm", ".ppm"),
)
MAX_FILE_BYTES = 1 << 28  # of one image file; an archive may declare anything
_PROBES = 64  # items whose content enters the digest where the listing has no checksums
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test")


class UnreadableImageError(SourceError):
    """One image that cannot be read or decoded; `path` within the source, `cause` in words."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{shown(path)}: {cause}")
        self.path = path
        self.cause = cause


class NoImagesError(SourceError):
    """A folder or an archive without any image file."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source."""

    path: str  # within the source, "/" between folders, surrogate escapes for undecodable bytes
    group: str | None  # its class
    size: int  # bytes of the file, -1 for what is not a readable regular file
    place: bytes = b""  # where the source that listed it finds it, packed: nobody else's business


@dataclass(frozen=True)
class Latents:
    """What a source of latents holds: (C, H, W) of each, and float16 or float32."""

    shape: tuple[int, int, int]
    dtype: np.dtype


class Source(ABC):
    """Images that can be listed in a fixed order and read by any thread; a context manager."""

    path: Path
    items: Sequence[Item]
    classes: tuple[str, ...]  # sorted by code point; () for a source without
    latents: Latents | None = None  # instead of images: `block` gives them, and nothing is decoded

    @abstractmethod
    def read(self, item: Item) -> bytes | UInt8[np.ndarray, "H W *C"]:
        """The file's bytes, or the pixels where the source holds pixels: (H, W) grey or (H, W, 3) RGB.

        Raises:
            UnreadableImageError: gone, not readable, too large, or not what the listing said.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """Names the source by its listing, not by where it lies."""

    def reading_order(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The same ascending `positions` of items, in the order in which they are best read."""
        return positions

    def holds(self, shape: tuple[int, int, int]) -> bool:  # noqa: ARG002
        """Whether every image is kept as uint8 (C, H, W) pixels of this `shape`, for `block` to give."""
        return False

    def block(self, positions: Int[np.ndarray, " n"]) -> Num[np.ndarray, "n C H W"]:
        """The pixels, or latents, of the items at `positions`, from any thread; only where `holds` says so.

        Raises:
            SourceError: a damaged file.
        """
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027
        """Frees what reading holds open, if anything."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_image(name: str) -> bool:
    """Whether `name` is that of an image file."""
    return name.lower().endswith(EXTENSIONS)


def is_hidden(parts: Sequence[str]) -> bool:
    """Whether a path of `parts` is an operating system's own business."""
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def arrange(
    files: Sequence[Item], others: int, source: Path, *, within: int = 0
) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """`files` in their fixed order and classed by folder, and the names of the classes.

    Args:
        files: images in any order, `group` unset.
        others: files seen that are no images, for the message.
        source: for the message.
        within: leading parts of every path that are no folders of images (the name of a shard).

    Raises:
        SourceError: no images, or images beside folders of images.
    """
    if not files:
        seen = f"{others} other files" if others else "nothing"
        raise NoImagesError(
            f"{shown(source)}: no images, {seen} found; wanted files named {' '.join(EXTENSIONS)}"
        )
    parts = [item.path.split("/")[within:] for item in files]
    level = 0
    while True:
        folders = {part[level] for part in parts if len(part) > level + 1}
        loose = [part for part in parts if len(part) == level + 1]
        if loose or len(folders) > 1 or not any(len(part) > level + 2 for part in parts):
            break
        level += 1
    if loose and folders:
        raise SourceError(
            f"{shown(source)}: {shown('/'.join(min(loose)))} lies beside folders of images such as "
            f"{shown(min(folders))}/; put every image in a class folder, or all into one folder"
        )
    if loose:
        return tuple(sorted(files, key=lambda item: item.path)), ()
    classed = [replace(item, group=part[level]) for item, part in zip(files, parts, strict=True)]
    classed.sort(key=lambda item: (item.group, item.path))
    return tuple(classed), tuple(sorted(folders))


def padded(labels: Sequence[str]) -> list[str]:
    """Class names that sort by code point as their numbers do: 7 of 1,000 is 0007.

    Names stay as they are, also where only some of them are numbers.
    """
    if not all(label.isascii() and label.isdecimal() for label in labels):
        return list(labels)
    numbers = [label.lstrip("0") or "0" for label in labels]
    width = max(map(len, numbers), default=0)
    return [number.zfill(width) for number in numbers]


def refuse_two_splits(names: Sequence[str], source: Path) -> None:
    """Refuses files of several splits (train-0.tar, val-0.tar) as one source.

    Raises:
        SourceError: naming one file of each, and how to choose.
    """
    first: dict[str, str] = {}
    for name in names:
        words = re.split(r"[^a-z]+", name.lower())
        first.setdefault(next((word for word in words if word in _SPLITS), ""), name)
    if len(first) > 1:
        one, two, *_ = sorted(first.values())
        split, name = next(pair for pair in first.items() if pair[0])
        pattern = source / (name[: name.lower().index(split) + len(split)] + "*")
        raise SourceError(
            f"{shown(source)}: {shown(one)} and {shown(two)} are of different splits; choose one by a "
            f"pattern in quotes, such as '{shown(pattern)}'"
        )


def listing_digest(
    kind: str, items: Sequence[Item], contents: Sequence[str], crc: Callable[[Item], int | None] | None = None
) -> str:
    """A digest of `items`, of their checksums where the listing has them, and of `contents`."""
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for item in items:
        # repr and the byte counts keep two lists from running into one text
        line = f"{item.group!r}/{item.path!r}/{item.size}/{crc(item) if crc else None}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    digest.update("\n".join(contents).encode())
    return digest.hexdigest()


def probed(items: Sequence[Item], read: Callable[[Item], bytes]) -> list[str]:
    """Checksums of a few items' content: sizes tell most sources apart, but not uncompressed images."""
    contents = []
    for item in items[:: max(1, len(items) // _PROBES)]:
        try:
            contents.append(str(zlib.crc32(read(item))))
        except UnreadableImageError:
            contents.append("unreadable")
    return contents


def regular_size(path: Path) -> int:
    """Bytes of the file at `path`.

    Raises:
        SourceError: missing, not a regular file, or not to be read.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise SourceError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise SourceError(f"{shown(path)}: not a regular file; move it away")
    return status.st_size


def too_large(size: int) -> str:
    """Why a file of `size` bytes is not read."""
    return f"a file of {format_bytes(size)}; wanted at most {format_bytes(MAX_FILE_BYTES)}"


def reason(error: BaseException) -> str:
    """The cause in one line, safe to show."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text or type(error).__name__).lower()
