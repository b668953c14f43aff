"""Files that are either whole or absent, folders only one process builds in, names safe to show."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnflow.errors import BusyError, StoreError

_PROBES = 64  # places of a file that `FileMark` reads beside its two ends
_PROBE_BYTES = 1 << 12
_END_BYTES = 1 << 20


def shown(name: object) -> str:
    r"""`name` with control characters, line ends and lone surrogates escaped: safe in a terminal."""
    text = str(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(path: Path) -> str:
    """`path` as a shell takes it, `shown`: for commands that an error suggests."""
    return shlex.quote(shown(path))


@contextlib.contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns the operating system's refusal at `path` into one line with the likely fix."""
    try:
        yield
    except OSError as error:
        fix = {
            28: "free space or name another disk; what is built so far is kept",  # ENOSPC
            122: "raise the quota or name another disk; what is built so far is kept",  # EDQUOT
            13: "choose a folder you may write to",  # EACCES
            30: "choose a folder on a writable disk",  # EROFS
            20: "a file stands where a folder was wanted; choose another path",  # ENOTDIR
            17: "a file stands where a folder was wanted; choose another path",  # EEXIST
        }.get(error.errno or 0, "see the cause")
        cause = error.strerror or str(error)
        raise StoreError(f"{doing} {shown(path)}: {cause.lower()}; {fix}") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and vanishes when not."""
    partial = path.with_name(path.name + ".partial")
    with disk_errors(path, "writing"):
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sync_folder(folder: Path) -> None:
    """Makes renames within `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` to `path` at once: readers see the old file or the new one."""
    with whole_file(path) as partial:
        text = json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False)
        partial.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in `path`.

    Raises:
        StoreError: absent, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"{shown(path)}: no such file; wanted {what}") from error
    except (OSError, ValueError, RecursionError) as error:  # undecodable bytes are a ValueError
        raise StoreError(f"{shown(path)}: not readable as {what} ({shown(error)})") from error
    if not isinstance(value, dict):
        raise StoreError(f"{shown(path)}: wanted {what} (a JSON object), got a {type(value).__name__}")
    return value


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Holds `folder` for one builder; the kernel frees it even when the builder is killed.

    Raises:
        BusyError: another process holds it.
    """
    with disk_errors(folder, "creating"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with disk_errors(folder, "locking"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(
                    f"{shown(folder)}: another process is building here; wait for it or name another folder"
                ) from error
        yield
    finally:
        os.close(descriptor)


def file_mark(path: Path) -> dict[str, Any]:
    """Size and a digest of sampled pages: tells another or a cut file apart without reading it all."""
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        step = max(1, size // _PROBES)
        places = [(0, _END_BYTES), (max(0, size - _END_BYTES), _END_BYTES)]
        places += [(place, _PROBE_BYTES) for place in range(0, size, step)]
        for place, length in places:
            file.seek(place)
            digest.update(file.read(length))
    return {"bytes": size, "sample": digest.hexdigest()}
