"""A folder of images: class-per-folder, or flat.

The first folder level names the class, whatever lies deeper belongs to it; folders that only wrap
the classes (`cifar10/train/cat/1.png`) are looked through.
"""

import os
import stat
from pathlib import Path

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
    probed,
    reason,
    too_large,
)


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
            raise UnreadableImageError(item.path, too_large(item.size))
        try:
            with open(os.path.join(self.path, item.path), "rb") as file:
                content = file.read(item.size + 1)
        except OSError as error:
            raise UnreadableImageError(item.path, reason(error)) from error
        if len(content) != item.size:
            raise UnreadableImageError(item.path, "changed its size since it was listed")
        return content

    @property
    def digest(self) -> str:  # noqa: D102
        return listing_digest("folder", self.items, probed(self.items, self.read))


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
                    if is_hidden([entry.name]):
                        continue
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if _is_folder(entry):
                        pending.append(name)
                    elif is_image(entry.name):
                        files.append(Item(name, None, _file_size(entry)))
                    else:
                        others += 1
        except OSError as error:
            raise SourceError(
                f"{shown(os.path.join(root, folder))}: cannot be listed ({reason(error)}); "
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
