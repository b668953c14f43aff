"""images.h5: one contiguous dataset of images at a known byte offset, and what belongs to its rows.

    images       (n, C, H, W) uint8 pixels, or float16 or float32 latents; contiguous, allocated early, never
                 filled
    labels       (n,) int64, ascending; -1 without classes
    classes      names of the classes, sorted; paths: of the n images within their source. Each is a
                 table of texts: <name> uint8 (UTF-8, surrogate escapes as bytes), <name>_ends int64
    user block   the first 1,024 bytes, which HDF5 leaves to its users: one line of JSON saying what
                 lies where, with a digest of all but the pixels; from byte 960 the fingerprint, in
                 hexadecimal, zeros until the file is whole. Of latents (version 2) the line names their
                 type and ends at byte 928; from there, likewise, what they are multiplied by and the
                 length of the longest row

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import torch

from nnflow.codec import BYTES, Codec
from nnflow.errors import StoreError
from nnflow.files import reserve, shown
from nnflow.texts import Texts

FORMAT = "nnflow images"
VERSION, FLOAT_VERSION = 1, 2
SCALINGS = (1e-6, 1e6)  # of latents: beyond, squares leave float32
RMS = "rms"  # the scaling that is to give the stored latents unit root mean square
_FLOATS = {"float16": torch.float16, "float32": torch.float32}
USER_BLOCK = 1024
LINE_ENDS = {VERSION: 960, FLOAT_VERSION: 928}
MARK_AT = 960  # of the fingerprint; it ends with the user block
_TABLES = ("labels", "classes", "classes_ends", "paths", "paths_ends")
_NUMBERS = ("labels", "classes_ends", "paths_ends")
COPYBYTES = 1 << 24  # read at once of a finished file
_ALIGNED = 64
BYTE = np.dtype("u1")
_FIX = "name the images.h5 of a finished OUT, or build it anew"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What was asked of a build; two equal recipes give equal files. None where it does not apply."""

    source: str  # digest of its listing
    listed: int  # images in the source, readable or not
    size: int | None = None  # of pixels, as the next two
    grey: bool | None = None
    background: str | None = None
    scaling: float | str | None = None  # of latents: a number, or RMS

    def said(self) -> dict[str, Any]:
        """What applies."""
        return {name: value for name, value in vars(self).items() if value is not None}


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
    dtype: np.dtype
    codec: Codec | None  # None of latents while the file is being built

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize


def create(
    path: Path,
    shape: tuple[int, int, int, int],
    recipe: Recipe,
    *,
    labels: np.ndarray,
    classes: Sequence[str],
    paths: Texts,
    dtype: np.dtype = BYTE,
) -> None:
    """Writes images.h5 but for pixels and fingerprint, its room on the disk reserved.

    Raises:
        OSError: the disk refuses.
    """
    tables = {"labels": labels.astype("<i8")}
    for name, texts in (("classes", Texts.of(classes)), ("paths", paths)):
        block, ends = texts.arrays
        tables |= {name: block, name + "_ends": ends.astype("<i8")}
    pixels = math.prod(shape) * dtype.itemsize
    size = pixels + sum(table.nbytes for table in tables.values()) + (1 << 16)
    with path.open("wb") as file:
        reserve(file.fileno(), size)  # a full disk refuses here, not within HDF5
    try:
        places = _write_hdf5(path, shape, recipe, tables, dtype)
    except RuntimeError as error:  # so h5py reports a failing write on closing
        number = re.search(r"errno = (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error
    pixels_at = places.pop("images")
    written = path.stat().st_size
    version = VERSION if dtype == BYTE else FLOAT_VERSION
    about = {
        "format": FORMAT,
        "version": version,
        "shape": shape,
        "recipe": recipe.said(),
        "pixels_at": pixels_at,
        "places": {name: [at, len(tables[name])] for name, at in places.items()},
        "bytes": written,
        "digest": _digest(path, pixels_at, pixels),
        **({} if dtype == BYTE else {"dtype": dtype.name}),
    }
    end = LINE_ENDS[version]
    line = json.dumps(about, ensure_ascii=True, sort_keys=True).encode().ljust(end - 1) + b"\n"
    assert len(line) == end
    with path.open("r+b") as file:
        reserve(file.fileno(), written)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _write_hdf5(
    path: Path, shape: tuple[int, ...], recipe: Recipe, tables: dict[str, np.ndarray], dtype: np.dtype
) -> dict[str, int]:
    """The HDF5 file; the byte offset of each dataset in it."""
    places = {}
    # A number in memory lies at a multiple of its size: so must it in a file that is mapped.
    aligned = {} if dtype == BYTE else {"alignment_threshold": 1, "alignment_interval": _ALIGNED}
    version = VERSION if dtype == BYTE else FLOAT_VERSION
    with h5py.File(path, "w", libver="earliest", userblock_size=USER_BLOCK, **aligned) as file:
        for name, value in sorted({"format": FORMAT, "version": version, **recipe.said()}.items()):
            file.attrs[name] = value
        for name, table in tables.items():
            data = _contiguous(file, name, table.shape, table.dtype)
            data[...] = table
            places[name] = data.id.get_offset() or 0  # none has no place
        images = _contiguous(file, "images", shape, dtype)  # last: the file grows by it
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
        file.seek(USER_BLOCK)
        digest.update(file.read(pixels_at - USER_BLOCK))
        file.seek(pixels_at + pixels)
        digest.update(file.read())
    return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Everything but the pixels of the images.h5 at `path`, whole or still being built.

    Raises:
        StoreError: missing, foreign, of another version, truncated, or inconsistent.
    """
    with _one_line(path), path.open("rb") as file:
        block = file.read(USER_BLOCK)
        if not block.startswith(b"{") or FORMAT.encode() not in block:
            raise StoreError(f"{shown(path)}: empty or foreign, not nnflow's images; {_FIX}")
        if len(block) < USER_BLOCK:
            raise ValueError("cut within its first line")
        about = json.loads(block[:MARK_AT].partition(b"\n")[0])
        if about["version"] not in LINE_ENDS:
            raise StoreError(
                f"{shown(path)}: version {shown(about['version'])} of nnflow's images, wanted "
                f"{VERSION} or {FLOAT_VERSION}; build it anew, or install the nnflow that wrote it"
            )
        dtype = _dtype(about)
        count, channels, height, width = shape = tuple(int(side) for side in about["shape"])
        size = path.stat().st_size
        if size != about["bytes"]:
            raise ValueError(f"{size} bytes, wanted {about['bytes']}")
        pixels_at, pixels = int(about["pixels_at"]), math.prod(shape) * dtype.itemsize
        if (
            min(shape) < 1
            or pixels_at < USER_BLOCK
            or pixels_at + pixels > size
            or pixels_at % dtype.itemsize
        ):
            raise ValueError(f"{shape} images that do not fit the file")
        if _digest(path, pixels_at, pixels) != about["digest"]:
            raise ValueError("its tables do not match their digest")
        tables = {name: _table(file, name, *about["places"][name]) for name in _TABLES}
        labels, classes = tables["labels"], tuple(_texts(tables, "classes"))
        paths = _texts(tables, "paths")
        mark = block[MARK_AT:].rstrip(b"\0").decode("ascii")
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
            dtype=dtype,
            codec=BYTES if dtype == BYTE else _latents(dtype, block[LINE_ENDS[FLOAT_VERSION] : MARK_AT]),
        )


def _dtype(about: dict[str, Any]) -> np.dtype:
    """Of the stored numbers."""
    if about["version"] == VERSION:
        return BYTE
    if about["dtype"] not in _FLOATS:
        raise ValueError("latents of no known type")
    return np.dtype(about["dtype"])


def _latents(dtype: np.dtype, written: bytes) -> Codec | None:
    """The codec that was written beside latents; None where none is yet."""
    text = written.rstrip(b"\0").decode("ascii")
    if not text:
        return None
    scaling, longest = map(float, text.split())
    if not SCALINGS[0] <= scaling <= SCALINGS[1] or not 0 <= longest < math.inf:
        raise ValueError("a scaling that is none")
    # Values are rounded to float32.
    reach = scaling * longest * (1 + 2**-20)
    return Codec(dtype=_FLOATS[dtype.name], unit=1 / scaling, offset=0.0, reach=reach)


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
