"""Files as read-only tensors, whose pages can be let go of.

Pages of a mapped file count as memory of the process once they have been read, also where the kernel could
take them back at any time: a stream over a map of 4 GB ends with 4 GB resident.
"""

import ctypes
import math
import mmap
import warnings
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor

# The kernel maps up to 16 pages around one that is asked for, also before it: those would stay.
_AROUND = 1 << 20

_maps: "WeakValueDictionary[int, mmap.mmap]" = WeakValueDictionary()  # by the address of their first row


def mapped(path: Path, offset: int, shape: tuple[int, int]) -> UInt8[Tensor, "n D"]:
    """Bytes of the file at `path` from `offset` on; writing to them crashes.

    Not a copy-on-write map: the kernel counts all of that as memory promised to this process, and
    refuses it when the file is larger than memory and swap.
    """
    with path.open("rb") as file:
        held = mmap.mmap(file.fileno(), offset + math.prod(shape), access=mmap.ACCESS_READ)
    rows = np.frombuffer(held, np.uint8, math.prod(shape), offset).reshape(shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
        found = torch.from_numpy(rows)
    _maps[found.data_ptr()] = held  # lives as long as a tensor over it
    return found


def let_go(rows: Shaped[Tensor, "..."]) -> None:
    """Takes the pages behind contiguous `rows` out of this process, if they are those of a map made here.

    They are read again from the file, or from the kernel's copy of it, when they are asked for. Any other
    tensor is left alone: the same call would fill it with zeros.
    """
    begin = rows.untyped_storage().data_ptr()
    held = _maps.get(begin) if rows.device.type == "cpu" else None
    if held is None or not rows.nbytes:
        return
    offset = len(held) - rows.untyped_storage().nbytes()
    start = offset + rows.data_ptr() - begin
    first = max(0, start - _AROUND) // mmap.PAGESIZE * mmap.PAGESIZE
    held.madvise(mmap.MADV_DONTNEED, first, start + rows.nbytes - first)


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
