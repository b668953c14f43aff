"""Images as uint8 arrays, or latents: .npz such as downsampled ImageNet's and ADM's batches, or one .npy.

    images   data, images, x or arr_0: (n, 3, H, W), (n, H, W, 3), (n, 1, H, W), (n, H, W, 1),
             (n, H, W), or rows of square images, (n, 3 H H) with the channels one after the other
    latents  likewise, or latents or z: (n, C, H, W) of float16 or float32, any C, H, W; kept as they are
    labels   labels, y or arr_1: (n,) integers; none in a .npy

Downsampled ImageNet numbers its classes from 1, and so they are called here: 0001 to 1000. An array
stored without compression is read through a map of the file, after one pass over it against its
checksum; a compressed one is unpacked once into a temporary file (in $TMPDIR), 16 MiB at a time.
Nothing is ever unpickled.
"""

import hashlib
import math
import mmap
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from jaxtyping import Int, Num, UInt8

from nnflow.errors import SourceError
from nnflow.files import file_mark, shown
from nnflow.memory import format_bytes
from nnflow.sources.archive import LOCAL_HEADER
from nnflow.sources.base import Item, Latents, Source, reason, regular_size
from nnflow.sources.tables import NumberedItems, classed, place_of

_IMAGES = ("data", "images", "latents", "x", "z", "arr_0")
_LABELS = ("labels", "y", "arr_1")
_COLOURS = 4  # no more as the last side of square float arrays: those are images, channels last
_COPY_BYTES = 1 << 24
# Bytes read of maps after which their pages are let go of, else all would stay; with each the kernel maps up
# to 16 pages around it.
_RESIDENT, _AROUND = 1 << 26, 1 << 16
_FIX = "save it anew by numpy.savez"


@dataclass(frozen=True)
class _Array:
    """One array within a file, found but not read."""

    path: Path
    name: str  # of its file, and within it, for messages
    shape: tuple[int, ...]
    dtype: np.dtype
    skip: int  # bytes of its own header
    at: int | None  # offset of that header in the file; None where it is compressed
    member: zipfile.ZipInfo | None  # of an .npz

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_size(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def mark(self) -> str:
        """Names its content."""
        content = self.member.CRC if self.member else file_mark(self.path)["sample"]
        return f"{self.shape} {self.dtype} {content}"

    def loaded(self) -> "_Loaded":
        """The array, through a map of its file or of what was unpacked.

        Raises:
            SourceError: damaged, or no room to unpack it.
        """
        try:
            held, first = _unpacked(self) if self.at is None else _mapped(self)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise SourceError(f"{self.name}: cannot be read ({reason(error)}); fetch it anew") from error
        images = np.ndarray(self.shape, self.dtype, held, first + self.skip)
        return _Loaded(_channels_first(images, self.name), held)


@dataclass(frozen=True)
class _Loaded:
    """Images, as a view of the map `held`."""

    images: Num[np.ndarray, "n C H W"]
    held: mmap.mmap


class ArraySource(Source):
    """The rows of one array, or of several files' of one shape."""

    items: NumberedItems

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Finds images and labels in each of `files`; no image is read yet."""
        self.path = path
        found = [_found(file) for file in files]
        self._arrays = [images for images, _ in found]
        first = self._arrays[0]
        for other in self._arrays:
            if other.shape[1:] != first.shape[1:]:
                raise SourceError(
                    f"{shown(path)}: {other.name} holds images of {other.shape[1:]}, {first.name} of "
                    f"{first.shape[1:]}; wanted one shape"
                )
            if other.dtype != first.dtype:
                raise SourceError(
                    f"{shown(path)}: {other.name} is of {other.dtype}, {first.name} of {first.dtype}; "
                    "wanted one type"
                )
        names = [file.name for file in files]
        labels, classes = classed([values for _, values in found], names, path)
        counts = [array.shape[0] for array in self._arrays]
        if not any(counts):
            raise SourceError(f"{shown(path)}: no images, the arrays are empty")
        self.items = NumberedItems(names, counts, labels, classes, size=first.row_size)
        self.classes = self.items.classes
        self._dtype = first.dtype
        self._shape = _channels_first(np.empty((0, *first.shape[1:]), first.dtype), first.name).shape[1:]
        if first.dtype != np.uint8:
            self.latents = Latents(self._shape, first.dtype)
        self._lock = Lock()
        self._loaded: dict[int, _Loaded] = {}
        self._since = 0  # bytes read of maps since their pages were let go of

    def _rows(self, file: int, count: int) -> Num[np.ndarray, "n C H W"]:
        """A file's images, as a view of its map, of which `count` are to be read."""
        with self._lock:
            self._since += count * max(self._arrays[file].row_size, _AROUND)
            if self._since >= _RESIDENT:
                self._since = 0
                for other in self._loaded.values():
                    other.held.madvise(mmap.MADV_DONTNEED)
            if file not in self._loaded:
                self._loaded[file] = self._arrays[file].loaded()
            return self._loaded[file].images

    def read(self, item: Item) -> UInt8[np.ndarray, "H W *C"]:  # noqa: D102
        file, row = place_of(item)
        image = self._rows(file, 1)[row]
        return np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))

    def holds(self, shape: tuple[int, int, int]) -> bool:  # noqa: D102
        return self._shape == shape

    def block(self, positions: Int[np.ndarray, " n"]) -> Num[np.ndarray, "n C H W"]:  # noqa: D102
        block = np.empty((len(positions), *self._shape), self._dtype)
        for file, chosen, rows in self.items.files_of(positions):
            block[chosen] = self._rows(file, len(rows))[rows]
        return block

    @property
    def digest(self) -> str:  # noqa: D102
        digest = hashlib.blake2b(b"arrays", digest_size=16)
        for array in self._arrays:
            digest.update(f"{array.mark}\n".encode())
        digest.update(repr(self.classes).encode())
        digest.update(self.items.labels.astype("<i4").tobytes())
        return digest.hexdigest()

    def close(self) -> None:  # noqa: D102
        self._loaded.clear()


def _found(file: Path) -> tuple[_Array, np.ndarray | None]:
    """The images in a file, not yet read, and its labels."""
    size = regular_size(file)
    try:
        with file.open("rb") as content:
            if content.read(6) == b"\x93NUMPY":
                content.seek(0)
                return _image_array(_described(content, file, shown(file), 0, None), size), None
        with zipfile.ZipFile(file) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            images = next((name for name in _IMAGES if name in members), None)
            if images is None:
                there = ", ".join(shown(name) for name in sorted(members)[:9]) or "nothing"
                raise SourceError(
                    f"{shown(file)}: no array named {', '.join(_IMAGES)}, found {there}; {_FIX} so named"
                )
            array = _image_array(_member(archive, members[images], file), size)
            labels = next((name for name in _LABELS if name in members), None)
            return array, _labels(archive, members[labels], array) if labels else None
    except SourceError:
        raise
    except Exception as error:
        # zipfile and numpy answer hostile bytes with any of a dozen exceptions, among them
        # SyntaxError, tokenize.TokenError, struct.error and NotImplementedError.
        raise SourceError(
            f"{shown(file)}: not a whole .npz or .npy ({reason(error)}); fetch it anew"
        ) from error


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, file: Path) -> _Array:
    at = None
    if info.compress_type == zipfile.ZIP_STORED:
        with file.open("rb") as whole:
            whole.seek(info.header_offset)
            signature, name, extra = LOCAL_HEADER.unpack(whole.read(LOCAL_HEADER.size))
        if signature != b"PK\3\4":
            raise zipfile.BadZipFile("no member where the listing says")
        at = info.header_offset + LOCAL_HEADER.size + name + extra
    with archive.open(info) as content:
        return _described(content, file, f"{shown(file)}: {shown(info.filename)}", at, info)


def _described(
    content: Any,
    file: Path,
    name: str,
    at: int | None,
    member: zipfile.ZipInfo | None,
) -> _Array:
    """The array whose .npy header the binary file `content` begins with."""
    version = np.lib.format.read_magic(content)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of its format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(content)
    if dtype.hasobject:
        raise SourceError(f"{name}: pickled Python objects, which are never read; {_FIX} from a plain array")
    if fortran and sum(side > 1 for side in shape) > 1:
        raise SourceError(f"{name}: in Fortran order; {_FIX} from numpy.ascontiguousarray(array)")
    return _Array(file, name, shape, dtype, content.tell(), at, member)


def _image_array(array: _Array, size: int) -> _Array:
    """`array`, refused unless it holds images or latents and lies whole in its file of `size` bytes."""
    if array.dtype not in (np.uint8, np.float16, np.float32):
        raise SourceError(
            f"{array.name}: {array.dtype} values; wanted images as uint8, 0 to 255, or latents as float16 or "
            "float32"
        )
    _channels_first(np.empty((0, *array.shape[1:]), array.dtype), array.name)
    wanted = array.skip + array.size
    there = array.member.file_size if array.member else size
    if there != wanted or (array.at is not None and array.at + wanted > size):
        raise SourceError(
            f"{array.name}: {there} bytes of the {wanted} of its {array.shape} values; cut off, fetch it anew"
        )
    return array


def _labels(archive: zipfile.ZipFile, info: zipfile.ZipInfo, images: _Array) -> np.ndarray:
    described = _member(archive, info, images.path)
    if described.shape != images.shape[:1] or described.dtype.kind not in "iuU":
        raise SourceError(
            f"{described.name}: {described.dtype} {described.shape}; wanted the class of each of the "
            f"{images.shape[0]} images, as integers or names"
        )
    with archive.open(info) as content:
        return np.lib.format.read_array(content, allow_pickle=False)


def _channels_first(images: np.ndarray, name: str) -> Num[np.ndarray, "n C H W"]:
    """`images` in any of the layouts above, as a view."""
    count, *sides = images.shape if images.ndim else (0,)
    if images.dtype != np.uint8:
        if len(sides) == 3 and all(sides) and not (sides[0] == sides[1] > sides[2] and sides[2] <= _COLOURS):
            return images
        raise SourceError(
            f"{name}: {images.dtype} values of shape {tuple(sides)}; wanted latents of (C, H, W), channels "
            "first, or images as uint8"
        )
    if len(sides) == 1 and sides[0]:
        for channels in (3, 1):
            side = math.isqrt(sides[0] // channels)
            if channels * side * side == sides[0]:
                return images.reshape(count, channels, side, side)
    if len(sides) == 2 and all(sides):
        return images[:, None]
    if len(sides) == 3 and all(sides) and (sides[0] in (1, 3)) != (sides[2] in (1, 3)):
        return images if sides[0] in (1, 3) else images.transpose(0, 3, 1, 2)
    raise SourceError(
        f"{name}: images of shape {tuple(sides)}; wanted (3, H, W), (H, W, 3), (1, H, W), (H, W, 1), "
        "(H, W), or 3 H H values"
    )


def _mapped(array: _Array) -> tuple[mmap.mmap, int]:
    """The file, read-only, once the array matches its checksum; where the array's header begins."""
    assert array.at is not None
    with array.path.open("rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = memoryview(held)[array.at : array.at + array.skip + array.size]
    if len(content) < array.skip + array.size:
        raise SourceError(f"{array.name}: was cut since it was listed; fetch it anew")
    if array.member is not None:
        crc = 0
        for start in range(0, len(content), _COPY_BYTES):
            crc = zlib.crc32(content[start : start + _COPY_BYTES], crc)
            held.madvise(mmap.MADV_DONTNEED)
        if crc != array.member.CRC:
            raise SourceError(f"{array.name}: its checksum differs from the file's: damaged, fetch it anew")
    return held, array.at


def _unpacked(array: _Array) -> tuple[mmap.mmap, int]:
    """A compressed array in a temporary file without a name, gone when it is closed; its first byte."""
    assert array.member is not None
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < array.member.file_size:
        raise SourceError(
            f"{array.name}: compressed, takes {format_bytes(array.member.file_size)} unpacked, of which "
            f"{format_bytes(free)} are free; set TMPDIR to a folder with room, or {_FIX}"
        )
    with tempfile.TemporaryFile() as file:
        with zipfile.ZipFile(array.path) as archive, archive.open(array.member) as content:
            shutil.copyfileobj(content, file, _COPY_BYTES)
        file.flush()
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), 0
