"""Where images come from: a folder or a zip, listed once in a fixed order and read in place.

Layouts: class-per-folder (the first folder level names the class, whatever lies deeper belongs to
it) or flat. Folders that only wrap the classes (`cifar10/train/cat/1.png`) are looked through. The
order is (class, path) by code point, so that one class is one slice and neither the file system
nor the number of workers matters.
"""

import hashlib
import os
import re
import stat
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nnflow.errors import SourceError
from nnflow.files import shown
from nnflow.memory import format_bytes

EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".pbm", ".pgm", ".pnm", ".ppm"),
)
MAX_FILE_BYTES = 1 << 28  # of one image file; a zip may declare anything
_PROBES = 64  # files of a folder whose content enters the digest
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, bytes of name and of extra


class UnreadableImageError(SourceError):
    """One image that cannot be read or decoded; `path` within the source, `cause` in words."""

    def __init__(self, path: str, cause: str) -> None:
        super().__init__(f"{shown(path)}: {cause}")
        self.path = path
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Item:
    """One image file of a source."""

    path: str  # within the source, "/" between folders, surrogate escapes for undecodable bytes
    group: str | None  # its class
    size: int  # bytes of the file, -1 for what is not a readable regular file
    crc: int | None = None  # CRC-32 of the content where the source lists it
    offset: int = 0  # zip: of the member's local header
    stored: int = 0  # zip: bytes within the archive
    method: int = 0  # zip: 0 stored, 8 deflated


class Source(ABC):
    """Images that can be listed in a fixed order and read by any thread; a context manager."""

    path: Path
    items: tuple[Item, ...]
    classes: tuple[str, ...]  # sorted by code point; () for a flat source

    @abstractmethod
    def read(self, item: Item) -> bytes:
        """The file's bytes.

        Raises:
            UnreadableImageError: gone, not readable, too large, or not what the listing said.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """Names the source by its listing, not by where it lies."""

    def close(self) -> None:  # noqa: B027
        """Frees what reading holds open, if anything."""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: Path | str) -> Source:
    """The images in the folder or zip at `path`.

    Raises:
        SourceError: missing, neither folder nor zip, without images, or laid out in no known way.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise SourceError(f"{shown(path)}: no such file or folder; check the spelling") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{shown(path)}: cannot be read ({_reason(error)})") from error
    if stat.S_ISDIR(mode):
        return FolderSource(path)
    if not stat.S_ISREG(mode):
        raise SourceError(f"{shown(path)}: wanted a folder of images or a zip of one")
    return ZipSource(path)


class FolderSource(Source):
    """A folder on disk; links are followed, each folder once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files, others = _walk(path)
        self.items, self.classes = arrange(files, others, path)

    def read(self, item: Item) -> bytes:  # noqa: D102
        if item.size < 0:
            raise UnreadableImageError(item.path, "not a regular file, or a link to nothing")
        if item.size > MAX_FILE_BYTES:
            raise UnreadableImageError(item.path, _too_large(item.size))
        try:
            with open(os.path.join(self.path, item.path), "rb") as file:
                content = file.read(item.size + 1)
        except OSError as error:
            raise UnreadableImageError(item.path, _reason(error)) from error
        if len(content) != item.size:
            raise UnreadableImageError(item.path, "changed its size since it was listed")
        return content

    @property
    def digest(self) -> str:  # noqa: D102
        # Sizes tell most sources apart, but those of uncompressed images are all the same; hence
        # the content of a few files as well.
        step = max(1, len(self.items) // _PROBES)
        contents = []
        for item in self.items[::step]:
            try:
                contents.append(str(zlib.crc32(self.read(item))))
            except UnreadableImageError:
                contents.append("unreadable")
        return _listing_digest("folder", self.items, contents)


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
                f"{shown(path)}: not a whole zip ({_reason(error)}); give a folder of images or a zip of one"
            ) from error
        except OSError as error:
            raise SourceError(f"{shown(path)}: cannot be read ({_reason(error)})") from error
        files, others = _members(members, path)
        self.items, self.classes = arrange(files, others, path)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, item: Item) -> bytes:  # noqa: D102
        # ZipFile.read takes a lock and 16 us per member, this 10 us and no lock.
        if max(item.size, item.stored) > MAX_FILE_BYTES:
            raise UnreadableImageError(item.path, _too_large(max(item.size, item.stored)))
        try:
            content = self._content(item)
        except (OSError, zlib.error, struct.error) as error:
            raise UnreadableImageError(item.path, _reason(error)) from error
        if len(content) != item.size or zlib.crc32(content) != item.crc:
            raise UnreadableImageError(item.path, "its checksum differs from the zip's: damaged zip")
        return content

    def _content(self, item: Item) -> bytes:
        guess = _LOCAL_HEADER.size + 4 * len(item.path) + 64  # name and extra field, nearly always
        block = os.pread(self._file, guess + item.stored, item.offset)
        signature, name, extra = _LOCAL_HEADER.unpack_from(block)
        if signature != b"PK\3\4":
            raise zlib.error("no zip member where the listing says: damaged zip")
        start = _LOCAL_HEADER.size + name + extra
        packed = block[start : start + item.stored]
        if len(packed) < item.stored:
            packed = os.pread(self._file, item.stored, item.offset + start)
        if item.method == zipfile.ZIP_STORED:
            return packed
        # One byte more than declared shows a member that lies about its size, without inflating it.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, item.size + 1)

    @property
    def digest(self) -> str:  # noqa: D102
        return _listing_digest("zip", self.items, [])

    def close(self) -> None:  # noqa: D102
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def arrange(files: Sequence[Item], others: int, source: Path) -> tuple[tuple[Item, ...], tuple[str, ...]]:
    """`files` in their fixed order and classed by folder, and the names of the classes.

    Args:
        files: images in any order, `group` unset.
        others: files seen that are no images, for the message.
        source: for the message.

    Raises:
        SourceError: no images, or images beside folders of images.
    """
    if not files:
        seen = f"{others} other files" if others else "nothing"
        raise SourceError(
            f"{shown(source)}: no images, {seen} found; wanted files named {' '.join(EXTENSIONS)}"
        )
    parts = [item.path.split("/") for item in files]
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


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def _walk(root: Path) -> tuple[list[Item], int]:
    """Image files below `root` in no order, and how many other files there are."""
    files: list[Item] = []
    others = 0
    seen: dict[tuple[int, int], str] = {}
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(os.path.join(root, folder))
            before = seen.setdefault((status.st_dev, status.st_ino), folder)
            if before != folder:  # a loop of links, or images that would count twice
                first, second = sorted((folder, before))
                raise SourceError(
                    f"{shown(root)}: {shown(first or '.')} and {shown(second)} are one folder; "
                    "remove the link"
                )
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    if _is_hidden([entry.name]):
                        continue
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        pending.append(name)
                    elif _is_image(entry.name):
                        files.append(Item(name, None, _file_size(entry)))
                    else:
                        others += 1
        except OSError as error:
            raise SourceError(
                f"{shown(os.path.join(root, folder))}: cannot be listed ({_reason(error)}); "
                "mend it or move it away"
            ) from error
    return files, others


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _file_size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def _members(members: Sequence[zipfile.ZipInfo], archive: Path) -> tuple[list[Item], int]:
    """Images among `members`, and how many other files there are."""
    files: list[Item] = []
    others = 0
    names: set[str] = set()
    for info in members:
        name = info.filename.replace("\\", "/")  # as zips made on Windows spell it
        _refuse_unsafe(info, name, archive)
        parts = PurePosixPath(name).parts
        if info.is_dir() or name.endswith("/") or _is_hidden(parts):
            continue
        name = "/".join(parts)
        if name in names:
            raise SourceError(f"{shown(archive)}: {shown(name)} is in it twice; pack the zip anew")
        names.add(name)
        if not _is_image(name):
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
        where = (info.header_offset, info.compress_size, info.compress_type)
        files.append(Item(name, None, info.file_size, info.CRC, *where))
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


def _listing_digest(kind: str, items: Sequence[Item], contents: Sequence[str]) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for item in items:
        # repr and the byte counts keep two lists from running into one text
        line = f"{item.group!r}/{item.path!r}/{item.size}/{item.crc}\n"
        digest.update(line.encode("utf-8", "surrogateescape"))
    digest.update("\n".join(contents).encode())
    return digest.hexdigest()


def _too_large(size: int) -> str:
    return f"a file of {format_bytes(size)}; wanted at most {format_bytes(MAX_FILE_BYTES)}"


def _reason(error: BaseException) -> str:
    """The cause in one line, safe to show."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text or type(error).__name__).lower()
