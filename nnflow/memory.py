"""Memory budgets in words, and the only place where a block size is chosen."""

import os
import re
from pathlib import Path

from nnflow.errors import InputError

DEFAULT_BUDGET = 1 << 30  # bytes of working memory, beside the pixels themselves

# Resident once torch, faiss and nnflow are imported and have computed something: 296 MiB and their buffers.
_LIBRARIES = 400 << 20

_LARGEST = 2.0**63  # bytes
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def parse_bytes(text: str | int) -> int:
    """Bytes named by `text`: 2GiB (2**31), 2GB (2 * 10**9), 512M (binary, as in ulimit), 4096.

    Raises:
        InputError: not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)\s*", str(text), re.IGNORECASE)
    if match is None:
        raise InputError(f"memory budget {text!r}: wanted a size such as 512MiB, 2GiB or 16G")
    number, unit, suffix = match.groups()
    scale = _UNITS if suffix.lower() == "b" else _BINARY
    size = float(number) * scale[unit.lower()]
    if not 1 <= size < _LARGEST:
        raise InputError(f"memory budget {text!r}: wanted at least one byte and less than 2**63")
    return int(size)


def machine_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or less where a control group says so."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of versions 2 and 1
        try:
            found = min(found, int(Path("/sys/fs/cgroup", name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return found


def working_memory(whole: int) -> int:
    """What is left of `whole` bytes for a process beside interpreter and libraries, at least a quarter."""
    return max(whole - _LIBRARIES, whole // 4)


def format_bytes(size: int | float) -> str:
    """`size` bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def rows_within(budget: int, bytes_per_row: int, *, at_most: int, what: str = "block", share: int = 1) -> int:
    """Rows that fit in one `share`-th of `budget` bytes, at least one and no more than `at_most`.

    Raises:
        InputError: a single row is larger than that.
    """
    rows = budget // share // max(1, bytes_per_row)
    if rows < 1:
        raise InputError(
            f"memory budget of {format_bytes(budget)} is too small: one row of the {what} takes "
            f"{format_bytes(bytes_per_row)}{f' of a 1/{share} share' if share > 1 else ''}; give at least "
            f"{format_bytes(share * bytes_per_row)}"
        )
    return int(min(rows, max(1, at_most)))
