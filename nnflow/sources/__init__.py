"""Where images come from, listed once in a fixed order and read in place.

A source is a folder of images or a zip of one, WebDataset shards (.tar), parquet tables as the
Hugging Face hub has them, or arrays (.npz, .npy). Several shards, tables or .npz are one source as
the folder that holds them, or as a pattern in quotes that names some of them (`'DIR/train-*'`).
"""

import os
import stat
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from nnflow.errors import DegradedWarning, SourceError
from nnflow.files import shown
from nnflow.sources.archive import ZipSource
from nnflow.sources.arrays import ArraySource
from nnflow.sources.base import (
    EXTENSIONS,
    MAX_FILE_BYTES,
    Item,
    Latents,
    NoImagesError,
    Source,
    UnreadableImageError,
    reason,
    refuse_two_splits,
)
from nnflow.sources.folder import FolderSource
from nnflow.sources.parquet import ParquetSource
from nnflow.sources.shards import TarSource
from nnflow.sources.subset import selected

__all__ = [
    "EXTENSIONS",
    "MAX_FILE_BYTES",
    "Item",
    "Latents",
    "Source",
    "UnreadableImageError",
    "open_source",
]

_KINDS: dict[str, Callable[[Path, Sequence[Path]], Source]] = {
    ".tar": TarSource,
    ".parquet": ParquetSource,
    ".npz": ArraySource,
    ".npy": ArraySource,
}
# What a folder is searched for, in this order: img2dataset puts a table of its own beside each shard.
_SHARDED = (".tar", ".parquet", ".npz")
_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_source(
    path: Path | str, *, limit: int | None = None, classes: Sequence[str] | None = None, seed: int = 0
) -> Source:
    """The images at `path`, all or those that `subset.selected` chooses of them.

    Args:
        path: a folder, a file, or a folder and a pattern such as `DIR/train-*`.
        limit: images kept, drawn at random by `seed`.
        classes: names of the classes kept.
        seed: of the draw.

    Raises:
        SourceError: missing, of no known kind, without images, or laid out in no known way.
        InputError: a class that it has not, or an argument out of range.
        MissingExtraError: a parquet table, without the extra `parquet`.
    """
    source = _opened(Path(path))
    try:
        return selected(source, limit=limit, classes=classes, seed=seed)
    except BaseException:
        source.close()
        raise


def _opened(path: Path) -> Source:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        if "*" in path.name and path.parent.is_dir():
            return _several(path, sorted(path.parent.glob(path.name)))
        raise SourceError(f"{shown(path)}: no such file or folder; check the spelling") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{shown(path)}: cannot be read ({reason(error)})") from error
    if stat.S_ISDIR(mode):
        return _folder(path)
    if not stat.S_ISREG(mode):
        raise SourceError(f"{shown(path)}: wanted a folder of images or a zip of one")
    if path.name.lower().endswith(_PACKED):
        raise _packed(path)
    kind = _KINDS.get(path.suffix.lower())
    return kind(path, [path]) if kind else ZipSource(path)


def _folder(path: Path) -> Source:
    """The images of a folder; where there are none, those in shards, tables or arrays at its top."""
    files = _listed(path) or _listed(path / "data")  # as the Hugging Face hub has it
    try:
        images = FolderSource(path)
    except NoImagesError:
        if not files:
            raise
        return _several(path, files)
    shards = [file for file in files if not file.name.lower().endswith(_PACKED)]
    if shards:
        pattern = shards[0].parent / f"*{shards[0].suffix}"
        warnings.warn(
            f"{shown(path)}: its {len(images.items)} image files are taken, not what is in "
            f"{shown(shards[0])}; for that, give the pattern '{shown(pattern)}' in quotes",
            DegradedWarning,
            stacklevel=4,
        )
    return images


def _listed(folder: Path) -> list[Path]:
    """Files of `folder` that may hold many images."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except OSError:  # FolderSource says what is wrong with it
        return []
    found = [name for name in names if name.lower().endswith((*_SHARDED, *_PACKED)) and name[0] != "."]
    return [folder / name for name in sorted(found)]


def _several(path: Path, files: Sequence[Path]) -> Source:
    """Those of `files` that are of one kind, as one source."""
    for suffix in _SHARDED:
        chosen = [file for file in files if file.suffix.lower() == suffix]
        if chosen:
            folder = chosen[0].parent
            refuse_two_splits([file.name for file in chosen], folder)
            return _KINDS[suffix](path, chosen)
    packed = [file for file in files if file.name.lower().endswith(_PACKED)]
    if packed:
        raise _packed(packed[0])
    raise SourceError(f"{shown(path)}: matches no file named {', '.join(_SHARDED)}; check the spelling")


def _packed(path: Path) -> SourceError:
    return SourceError(
        f"{shown(path)}: a compressed tar, which cannot be read from the middle; unpack it to a .tar, "
        "for example by gunzip, unxz or unzstd"
    )
