"""images.h5: one contiguous uint8 dataset at a known byte offset, and what belongs to its rows.

    images       (n, C, H, W) uint8, contiguous, allocated early, never filled
    labels       (n,) int64, ascending; -1 without classes
    classes      names of the classes, sorted; paths: of the n images within their source. Each is a
                 table of texts: <name> uint8 (UTF-8, surrogate escapes as bytes), <name>_ends int64
    user block   the first 1,024 bytes, which HDF5 leaves to its users: one line of JSON saying what
                 lies where, with a digest of all but the pixels; from byte 960 the fingerprint, in
                 hexadecimal, zeros until the file is whole

Rows and fingerprint are written into their places in the closed file, so a kill at any moment
leaves a file that opens; no times are stored, so that equal content is equal bytes. HDF5 writes
the file, for other tools to read; nnflow reads by the user block alone, because the HDF5 library
crashes (measured: 8 random bytes in its tables end the process by SIGSEGV) where a damaged or
hostile file should be refused. The only user of h5py.
"""

import errno
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import h5py
import numpy as np

from nnflow.errors import StoreError
from nnflow.files import shown

FORMAT = "nnflow images"
VERSION = 1
_USER_BLOCK = 1024
_MARK_AT = 960  # of the fingerprint; it ends with the user block
_TABLES = ("labels", "classes", "classes_ends", "paths", "paths_ends")
_NUMBERS = ("labels", "classes_ends", "paths_ends")
COPY_BYTES = 1 << 24  # read at once of a finished file
_SYNC_SECONDS = 2.0  # of work a kill may cost
_FIX = "name the images.h5 of a finished OUT, or build it anew"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was asked of a build; two equal recipes give equal files."""

    size: int
    grey: bool
    background: str
    source: str  # digest of its listing
    listed: int  # images in the source, readable or not


class Texts(Sequence[str]):
    """Many strings as one block of bytes: 1.3 million paths take their length and 8 bytes each."""

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self._block = block
        self._ends = ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Packs `texts`, lone surrogates (undecodable bytes of file names) included."""
        coded = [text.encode("utf-8", "surrogateescape") for text in texts]
        return cls(b"".join(coded), np.cumsum([len(code) for code in coded], dtype=np.int64))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The block as uint8 and the end of each text within it."""
        return np.frombuffer(self._block, np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, IndexError
        start = int(self._ends[row - 1]) if row else 0
        return self._block[start : int(self._ends[row])].decode("utf-8", "surrogateescape")


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of images.h5 but the pixels, and where they lie."""

    shape: tuple[int, int, int, int]  # n, C, H, W
    recipe: Recipe
    labels: np.ndarray  # (n,) int64
    classes: tuple[str, ...]
    paths: Texts
    fingerprint: str  # "" while the file is being built
    pixels_at: int  # byte offset of the first pixel

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape[1:]))


def create(
    path: Path,
    shape: tuple[int, int, int, int],
    recipe: Recipe,
    *,
    labels: np.ndarray,
    classes: Sequence[str],
    paths: Texts,
) -> None:
    """Writes images.h5 but for pixels and fingerprint, its room on the disk reserved.

    Raises:
        OSError: the disk refuses.
    """
    tables = {"labels": labels.astype("<i8")}
    for name, texts in (("classes", Texts.of(classes)), ("paths", paths)):
        block, ends = texts.arrays
        tables |= {name: block, name + "_ends": ends.astype("<i8")}
    size = math.prod(shape) + sum(table.nbytes for table in tables.values()) + (1 << 16)
    with path.open("wb") as file:
        reserve(file.fileno(), size)  # a full disk refuses here, not within HDF5
    try:
        places = _write_hdf5(path, shape, recipe, tables)
    except RuntimeError as error:  # so h5py reports a failing write on closing
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
    pixels_at = places.pop("images")
    written = path.stat().st_size
    about = {
        "format": FORMAT,
        "version": VERSION,
        "shape": shape,
        "recipe": vars(recipe),
        "pixels_at": pixels_at,
        "places": {name: [at, len(tables[name])] for name, at in places.items()},
        "bytes": written,
        "digest": _digest(path, pixels_at, math.prod(shape)),
    }
    line = json.dumps(about, ensure_ascii=True, sort_keys=True).encode().ljust(_MARK_AT - 1) + b"\n"
    assert len(line) == _MARK_AT
    with path.open("r+b") as file:
        reserve(file.fileno(), written)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _write_hdf5(
    path: Path, shape: tuple[int, ...], recipe: Recipe, tables: dict[str, np.ndarray]
) -> dict[str, int]:
    """The HDF5 file; the byte offset of each dataset in it."""
    places = {}
    with h5py.File(path, "w", libver="earliest", userblock_size=_USER_BLOCK) as file:
        for name, value in sorted({"format": FORMAT, "version": VERSION, **vars(recipe)}.items()):
            file.attrs[name] = value
        for name, table in tables.items():
            data = _contiguous(file, name, table.shape, table.dtype)
            data[...] = table
            places[name] = data.id.get_offset() or 0  # none has no place
        images = _contiguous(file, "images", shape, np.dtype("u1"))  # last: the file grows by it
        places["images"] = images.id.get_offset()
    return places


def _contiguous(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    kind = h5py.h5t.py_create(dtype)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, creation))


def _digest(path: Path, pixels_at: int, pixels: int) -> str:
    """Of all that lies between the user block and the pixels, and behind them."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        file.seek(_USER_BLOCK)
        digest.update(file.read(pixels_at - _USER_BLOCK))
        file.seek(pixels_at + pixels)
        digest.update(file.read())
    return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Everything but the pixels of the images.h5 at `path`, whole or still being built.

    Raises:
        StoreError: missing, foreign, of another version, truncated, or inconsistent.
    """
    with _one_line(path), path.open("rb") as file:
        block = file.read(_USER_BLOCK)
        if not block.startswith(b"{") or FORMAT.encode() not in block:
            raise StoreError(f"{shown(path)}: empty or foreign, not nnflow's images; {_FIX}")
        if len(block) < _USER_BLOCK:
            raise ValueError("cut within its first line")
        about = json.loads(block[:_MARK_AT])
        if about["version"] != VERSION:
            raise StoreError(
                f"{shown(path)}: version {shown(about['version'])} of nnflow's images, wanted "
                f"{VERSION}; build it anew, or install the nnflow that wrote it"
            )
        count, channels, height, width = shape = tuple(int(side) for side in about["shape"])
        size = path.stat().st_size
        if size != about["bytes"]:
            raise ValueError(f"{size} bytes, wanted {about['bytes']}")
        pixels_at = int(about["pixels_at"])
        if min(shape) < 1 or pixels_at < _USER_BLOCK or pixels_at + math.prod(shape) > size:
            raise ValueError(f"{shape} images that do not fit the file")
        if _digest(path, pixels_at, math.prod(shape)) != about["digest"]:
            raise ValueError("its tables do not match their digest")
        tables = {name: _table(file, name, *about["places"][name]) for name in _TABLES}
        labels, classes = tables["labels"], tuple(_texts(tables, "classes"))
        paths = _texts(tables, "paths")
        mark = block[_MARK_AT:].rstrip(b"\0").decode("ascii")
        if not re.fullmatch(r"([0-9a-f]{64})?", mark):
            raise ValueError("a fingerprint that is none")
        low, high = (0, len(classes)) if classes else (-1, 0)
        if len(labels) != count or len(paths) != count:
            raise ValueError(f"{len(labels)} labels and {len(paths)} paths of {count} images")
        if (np.diff(labels) < 0).any() or labels[0] < low or labels[-1] >= high:
            raise ValueError("labels that do not ascend or have no class")
        return Header(
            shape=(count, channels, height, width),
            recipe=Recipe(**about["recipe"]),
            labels=labels,
            classes=classes,
            paths=paths,
            fingerprint=mark,
            pixels_at=pixels_at,
        )


def _table(file: BinaryIO, name: str, at: int, length: int) -> np.ndarray:
    kind = np.dtype("<i8" if name in _NUMBERS else "u1")
    if at < 0 or length < 0:
        raise ValueError(f"{name} before the file")
    file.seek(at)
    content = file.read(length * kind.itemsize)
    if len(content) < length * kind.itemsize:
        raise ValueError(f"{name} beyond the file")
    return np.frombuffer(content, kind).astype(kind.newbyteorder("="))


def _texts(tables: dict[str, np.ndarray], name: str) -> Texts:
    block, ends = tables[name].tobytes(), tables[name + "_ends"]
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or ends[-1] > len(block)):
        raise ValueError(f"{name} that overlap")
    return Texts(block, ends)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever is wrong with the file at `path`, as a StoreError."""
    if not path.is_file():
        raise StoreError(f"{shown(path)}: no such file; {_FIX}")
    try:
        yield
    except StoreError:
        raise
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        cause = shown(" ".join(str(error).split()))
        raise StoreError(f"{shown(path)}: truncated or damaged ({cause}); {_FIX}") from error


class Rows:
    """The file being built, and the journal of the rows that are safely in it."""

    def __init__(self, partial: Path, journal: Path, header: Header) -> None:
        self.header = header
        self._journal = os.open(journal, os.O_RDWR | os.O_CLOEXEC)
        self._file = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        self.done = np.frombuffer(os.pread(self._journal, header.shape[0], 0), np.uint8) == 1
        self._noted: list[int] = []
        self._synced = time.monotonic()

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        os.close(self._journal)

    def _at(self, row: int) -> int:
        return self.header.pixels_at + row * self.header.row_bytes

    def get(self, first: int, count: int) -> memoryview:
        """The bytes of `count` rows."""
        block = os.pread(self._file, count * self.header.row_bytes, self._at(first))
        if len(block) < count * self.header.row_bytes:
            raise StoreError("the file being built was cut by someone else; remove OUT, build anew")
        return memoryview(block)

    def put(self, positions: Sequence[int], block: np.ndarray) -> None:
        """Writes one row per position, ascending; any thread, no two with the same rows."""
        start = 0
        for first, count in runs(positions):
            piece = block[start : start + count].data.cast("B")
            write_at(self._file, piece, self._at(first))
            start += count

    def note(self, positions: Sequence[int]) -> None:
        """Rows that are written; they count once synced."""
        self._noted.extend(positions)
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Rows to the disk first, then their marks: a mark never stands for a missing row."""
        os.fdatasync(self._file)
        for first, count in runs(sorted(self._noted)):
            write_at(self._journal, memoryview(b"\1" * count), first)
        os.fdatasync(self._journal)
        self._noted.clear()
        self._synced = time.monotonic()


def runs(positions: Sequence[int], at_most: int | None = None) -> Iterator[tuple[int, int]]:
    """Ascending positions as (first, count) of consecutive ones, cut into `at_most`."""
    start = 0
    for end in range(1, len(positions) + 1):
        whole = end - start == at_most
        if end == len(positions) or positions[end] != positions[end - 1] + 1 or whole:
            yield positions[start], end - start
            start = end


def write_at(descriptor: int, block: memoryview, offset: int) -> int:
    """Writes all of `block`: a disk that fills up first takes a part, then refuses."""
    written = 0
    while written < len(block):
        written += os.pwrite(descriptor, block[written:], offset + written)
    return written


def reserve(descriptor: int, size: int) -> None:
    """Room for `size` bytes, so that a disk too small is told before the work and not after."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # file systems that cannot reserve
            raise


def seal(path: Path) -> None:
    """Writes the fingerprint of the finished rows and brings all to the disk."""
    header = read_header(path)
    about = json.dumps([header.shape, header.classes])
    digest = hashlib.blake2b(about.encode(), digest_size=(_USER_BLOCK - _MARK_AT) // 2)
    digest.update(header.labels.astype("<i8").tobytes())
    with path.open("r+b") as file:
        file.seek(header.pixels_at)
        left = header.shape[0] * header.row_bytes
        while left:
            block = file.read(min(left, COPY_BYTES))
            if not block:
                raise StoreError(f"{shown(path)}: was cut while it was read; build it anew")
            digest.update(block)
            left -= len(block)
        write_at(file.fileno(), memoryview(digest.hexdigest().encode()), _MARK_AT)
        os.fsync(file.fileno())
