"""Files as read-only tensors, whose pages can be let go of.

Pages of a mapped file count as memory of the process once they have been read, also where the kernel could
take them back at any time: a stream over a map of 4 GB ends with 4 GB resident.
"""

import ctypes
import functools
import math
import mmap
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary, WeakValueDictionary, finalize

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8
from torch import Tensor

from nnflow.errors import StoreError
from nnflow.files import disk_errors, shown

# The kernel maps up to 16 pages around one that is asked for, also before it: those would stay.
_AROUND = 1 << 20

_maps: "WeakValueDictionary[int, mmap.mmap]" = WeakValueDictionary()  # by the address of their first row
_files: "WeakKeyDictionary[mmap.mmap, _Opened]" = WeakKeyDictionary()

_READERS = 4  # threads that read rows: on a disk, so many are asked of it at once
_FEW = 16  # rows that one thread reads sooner than it is woken


def mapped(path: Path, offset: int, shape: tuple[int, int]) -> UInt8[Tensor, "n D"]:
    """Bytes of the file at `path` from `offset` on; writing to them crashes.

    Not a copy-on-write map: the kernel counts all of that as memory promised to this process, and
    refuses it when the file is larger than memory and swap.
    """
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), offset + math.prod(shape), access=mmap.ACCESS_READ)
        number = os.dup(file.fileno())  # mmap has its own and does not tell it
    finalize(held, os.close, number)
    _files[held] = _Opened(path, number)
    rows = np.frombuffer(held, np.uint8, math.prod(shape), offset).reshape(shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        found = torch.from_numpy(rows)
    _maps[found.data_ptr()] = held  # lives as long as a tensor over it
    return found


@dataclass(frozen=True)
class _Opened:
    """The file behind a map, for reading it otherwise."""

    path: Path
    number: int


@dataclass(frozen=True)
class Written:
    """When a file was last written to, so that a change under an open map is noticed.

    A file that another took the place of by a rename is no change: the map is still of the old one.
    """

    path: Path
    node: int
    size: int
    when: int

    @classmethod
    def now(cls, path: Path) -> "Written":
        """As it is."""
        found = path.stat()
        return cls(path, found.st_ino, found.st_size, found.st_mtime_ns)

    def check(self) -> None:
        """Refuses a file that has been written to since: 2 us; reading one that was cut ends the process.

        Raises:
            StoreError: naming it.
        """
        try:
            found = Written.now(self.path)
        except OSError:  # gone, but for the map
            return
        if found.node == self.node and found != self:
            raise StoreError(
                f"{shown(self.path)}: written to since it was opened ({self.size} bytes then, {found.size} "
                "now); restore it or build it again, then open it again"
            )


def let_go(rows: Shaped[Tensor, "..."]) -> None:
    """Takes the pages behind contiguous `rows` out of this process, if they are those of a map made here.

    They are read again from the file, or from the kernel's copy of it, when they are asked for. Any other
    tensor is left alone: the same call would fill it with zeros.
    """
    held = _map_of(rows)
    if held is None or not rows.nbytes:
        return
    start = _start(rows, held)
    first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    held.madvise(mmap.MADV_DONTNEED, first, start + rows.nbytes - first)


def _map_of(rows: Tensor) -> mmap.mmap | None:
    """The map made here that `rows` are of."""
    return _maps.get(rows.untyped_storage().data_ptr()) if rows.device.type == "cpu" else None


def _start(rows: Tensor, held: mmap.mmap) -> int:
    """Where contiguous `rows` begin in the file."""
    storage = rows.untyped_storage()
    return len(held) - storage.nbytes() + rows.data_ptr() - storage.data_ptr()


def rows_at(rows: Shaped[Tensor, "n D"], ids: Int[Tensor, " m"]) -> Shaped[Tensor, "m D"]:
    """Contiguous `rows` by number, read from their file if they are a map made here: none becomes resident.

    A row's first touch through the map takes 5 to 13 us and brings 64 KiB along, reading it 3 to 5 (12 KB
    a row, 2 threads, the file in the kernel's memory), touching it again 1 to 3.

    Raises:
        StoreError: the file is shorter than it was, or cannot be read.
    """
    held = _map_of(rows)
    if held is None:
        return rows.index_select(0, ids.to(rows.device))
    file, offset = _files[held], _start(rows, held)
    wanted, places = ids.cpu().sort()  # in the order of the file
    found = rows.new_empty(len(ids), rows.shape[1])
    width = rows.shape[1] * rows.element_size()
    into = found.view(torch.uint8).numpy()

    def read(part: slice) -> None:
        for row, place in zip(wanted[part].tolist(), places[part].tolist(), strict=True):
            got = os.preadv(file.number, [into[place]], offset + row * width)
            if got != width:
                raise StoreError(
                    f"{shown(file.path)}: {got} of {width} bytes of row {row}; it has been cut since it was "
                    "opened: restore it or build it again"
                )

    with disk_errors(file.path, "reading"):
        if len(ids) <= _FEW:
            read(slice(0, len(ids)))
        else:
            each = -(-len(ids) // _READERS)
            parts = [slice(start, start + each) for start in range(0, len(ids), each)]
            list(_readers(os.getpid()).map(read, parts))
    return found


@functools.cache
def _readers(process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Threads of this process: a fork has none of its parent's."""
    return ThreadPoolExecutor(_READERS, "nnflow-rows")


def maps_of(path: Path) -> tuple[tuple[int, int], ...]:
    """Addresses, first and end, at which this process has mapped `path` by now; () where that is not told."""
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return ()
    wanted = str(path.resolve())
    found = [line.split(maxsplit=5) for line in lines if line.endswith(wanted)]
    spans = [fields[0].split("-") for fields in found if len(fields) == 6 and fields[5] == wanted]
    return tuple((int(first, 16), int(end, 16)) for first, end in spans)


def let_go_of(maps: tuple[tuple[int, int], ...]) -> None:
    """As `let_go`, of another library's read-only maps of files, which must still be there."""
    for first, end in maps:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
