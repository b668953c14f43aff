"""images.h5 while it is being built: rows in their places, a journal of those on the disk, then the seal."""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nnflow.errors import StoreError
from nnflow.files import shown, write_at
from nnflow.hdf5file import (
    BYTE,
    FLOAT_VERSION,
    LINE_ENDS,
    MARK_AT,
    RMS,
    SCALINGS,
    USER_BLOCK,
    Header,
    read_header,
)

COPY_BYTES = 1 << 24  # read at once of a finished file
_SYNC_SECONDS = 2.0  # of work a kill may cost


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


def seal(path: Path) -> None:
    """Writes the fingerprint of the finished rows, and the scaling of latents, and brings all to the disk.

    Raises:
        StoreError: cut meanwhile, or latents that no scaling gives unit root mean square.
    """
    header = read_header(path)
    floats = header.dtype != BYTE
    about = [header.shape, header.classes, *([header.dtype.name] if floats else [])]
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=(USER_BLOCK - MARK_AT) // 2)
    digest.update(header.labels.astype("<i8").tobytes())
    total = longest = 0.0
    step = max(1, COPY_BYTES // header.row_bytes)
    with path.open("r+b") as file:
        file.seek(header.pixels_at)
        for first in range(0, header.shape[0], step):
            count = min(step, header.shape[0] - first)
            block = file.read(count * header.row_bytes)
            if len(block) < count * header.row_bytes:
                raise StoreError(f"{shown(path)}: was cut while it was read; build it anew")
            digest.update(block)
            if floats:
                squares = _squares(np.frombuffer(block, header.dtype).reshape(count, -1))
                total, longest = total + float(squares.sum()), max(longest, float(squares.max()))
        written = _scaling(header, total, longest) if floats else b""
        digest.update(written)
        at = LINE_ENDS[FLOAT_VERSION] if floats else MARK_AT
        # At once: within one sector of any disk.
        mark = written.ljust(MARK_AT - at, b"\0") + digest.hexdigest().encode()
        write_at(file.fileno(), memoryview(mark), at)
        os.fsync(file.fileno())


def _squares(rows: Float[np.ndarray, "m D"]) -> Float[np.ndarray, " m"]:
    """|z|^2 of each row, float64."""
    parts = np.array_split(rows, max(1, rows.nbytes >> 20))
    return np.concatenate([np.square(part, dtype=np.float64).sum(1) for part in parts])


def _scaling(header: Header, total: float, longest: float) -> bytes:
    """What latents are multiplied by, six digits of it where that was measured, and the longest row."""
    scaling = header.recipe.scaling
    if scaling == RMS:
        mean = total / math.prod(header.shape)
        scaling = float(f"{mean**-0.5:.6g}") if mean > 0 else 0.0
    if not isinstance(scaling, float) or not SCALINGS[0] <= scaling <= SCALINGS[1]:
        raise StoreError(
            f"latents with a root mean square of {math.sqrt(total / math.prod(header.shape)):.3g}: unit root "
            f"mean square needs a scaling from {SCALINGS[0]:g} to {SCALINGS[1]:g}; give one, --scaling 1"
        )
    return f"{scaling:.9g} {math.sqrt(longest) * (1 + 1e-8):.9g}".encode()
