"""A zip of images, laid out as a folder of images is, read in place."""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from nnflow.errors import SourceError
from nnflow.files import shown
from nnflow.sources.base import (
    MAX_FILE_BYTES,
    Item,
    Source,
    UnreadableImageError,
    arrange,
    is_hidden,
    is_image,
    listing_digest,
    reason,
    too_large,
)

LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, bytes of name and of extra
_PLACE = struct.Struct("<qQIH")  # of an item: offset of its local header, packed bytes, CRC-32, method


class ZipSource(Source):
    """A zip, read in place: nothing is extracted, no member may point out of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            UnicodeError,
            struct.error,
            ValueError,
        ) as error:
            raise SourceError(
                f"{shown(path)}: not a whole zip ({reason(error)}); give a folder of images or a zip of one"
            ) from error
        except OSError as error:
            raise SourceError(f"{shown(path)}: cannot be read ({reason(error)})") from error
        files, others = _members(members, path)
        self.items, self.classes = arrange(files, others, path)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, item: Item) -> bytes:  # noqa: D102
        # ZipFile.read takes a lock and 16 us per member, this 10 us and no lock.
        offset, stored, crc, method = _PLACE.unpack(item.place)
        if max(item.size, stored) > MAX_FILE_BYTES:
            raise UnreadableImageError(item.path, too_large(max(item.size, stored)))
        try:
            content = self._content(item, offset, stored, method)
        except (OSError, zlib.error, struct.error) as error:
            raise UnreadableImageError(item.path, reason(error)) from error
        if len(content) != item.size or zlib.crc32(content) != crc:
            raise UnreadableImageError(item.path, "its checksum differs from the zip's: damaged zip")
        return content

    def _content(self, item: Item, offset: int, stored: int, method: int) -> bytes:
        guess = LOCAL_HEADER.size + 4 * len(item.path) + 64  # name and extra field, nearly always
        block = os.pread(self._file, guess + stored, offset)
        signature, name, extra = LOCAL_HEADER.unpack_from(block)
        if signature != b"PK\3\4":
            raise zlib.error("no zip member where the listing says: damaged zip")
        start = LOCAL_HEADER.size + name + extra
        packed = block[start : start + stored]
        if len(packed) < stored:
            packed = os.pread(self._file, stored, offset + start)
        if method == zipfile.ZIP_STORED:
            return packed
        # One byte more than declared shows a member that lies about its size, without inflating it.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, item.size + 1)

    @property
    def digest(self) -> str:  # noqa: D102
        return listing_digest("zip", self.items, [], lambda item: _PLACE.unpack(item.place)[2])

    def close(self) -> None:  # noqa: D102
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _members(members: Sequence[zipfile.ZipInfo], archive: Path) -> tuple[list[Item], int]:
    """Images among `members`, and how many other files there are."""
    files: list[Item] = []
    others = 0
    names: set[str] = set()
    for info in members:
        name = info.filename.replace("\\", "/")  # as zips made on Windows spell it
        _refuse_unsafe(info, name, archive)
        parts = PurePosixPath(name).parts
        if info.is_dir() or name.endswith("/") or is_hidden(parts):
            continue
        name = "/".join(parts)
        if name in names:
            raise SourceError(f"{shown(archive)}: {shown(name)} is in it twice; pack the zip anew")
        names.add(name)
        if not is_image(name):
            others += 1
            continue
        if info.flag_bits & 0x1:
            raise SourceError(
                f"{shown(archive)}: {shown(name)} is encrypted; pack the zip without a password"
            )
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise SourceError(
                f"{shown(archive)}: {shown(name)} is packed by method {info.compress_type}; "
                "wanted stored or deflated"
            )
        offset = min(max(info.header_offset, -1), (1 << 63) - 1)  # a damaged zip may name any
        place = _PLACE.pack(offset, info.compress_size, info.CRC, info.compress_type)
        files.append(Item(name, None, info.file_size, place))
    return files, others


def _refuse_unsafe(info: zipfile.ZipInfo, name: str, archive: Path) -> None:
    """Refuses members that could name something outside the archive."""
    original = info.orig_filename.replace("\\", "/")  # zipfile cuts names at a NUL and strips drives
    outside = name.startswith("/") or original.startswith("/") or ".." in original.split("/")
    if outside or "\0" in original or re.match(r"[A-Za-z]:", original):
        raise SourceError(
            f"{shown(archive)}: {shown(info.orig_filename)} points out of the zip; "
            "pack it with relative names"
        )
    if stat.S_ISLNK(info.external_attr >> 16):
        raise SourceError(f"{shown(archive)}: {shown(name)} is a symbolic link; pack the file it points to")
