"""Images in parquet tables, as the Hugging Face hub and `datasets` write them. The only user of pyarrow.

    images   the column that the Hugging Face metadata call an Image; else the one of structs with a
             field `bytes`; else the one of bytes named image, img, jpg, jpeg, png or webp
    labels   the column that the metadata call a ClassLabel, with its names; else integers or names in
             one named label, labels, fine_label, class or cls. -1 is none

Where several columns would do, those called as above come first, in that order. Row groups
are read whole, and the last 256 MiB of them are kept (2 at least), beside the one that each thread is
working on.
"""

import contextlib
import hashlib
import importlib
import json
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Int

from nnflow.errors import MissingExtraError, SourceError
from nnflow.files import shown
from nnflow.sources.base import (
    MAX_FILE_BYTES,
    Item,
    Source,
    UnreadableImageError,
    reason,
    regular_size,
    too_large,
)
from nnflow.sources.tables import NumberedItems, classed, place_of

_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABELS = ("label", "labels", "fine_label", "class", "cls")
_KEPT_BYTES = 1 << 28  # of row groups, ...
_KEPT = 2  # ... but no fewer than these
_PAGE = 1 << 12


@dataclass(frozen=True)
class _Columns:
    """Where a table has its images and labels."""

    image: str
    nested: bool  # in structs, as their field `bytes`
    label: str | None
    names: tuple[str, ...] | None  # of the labels 0, 1, ...

    def __str__(self) -> str:
        names = "" if self.names is None else f" of {len(self.names)} named classes"
        return f"{shown(self.image)} and {shown(self.label or 'none')}{names}"


class ParquetSource(Source):
    """The rows of one table, or of several with the same columns."""

    items: NumberedItems

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        """Reads the labels of each of `files`; no image is read yet."""
        self.path = path
        tables = [_Table(file) for file in files]
        columns = tables[0].columns
        for table in tables:
            if table.columns != columns:
                raise SourceError(
                    f"{table.name}: images and labels are in {table.columns}, those of {tables[0].name} in "
                    f"{columns}; wanted the same columns in all files"
                )
        names = [file.name for file in files]
        labels, classes = classed([table.labels() for table in tables], names, path, called=columns.names)
        counts = [table.starts[-1] for table in tables]
        if not any(counts):
            raise SourceError(f"{shown(path)}: no images, the tables are empty")
        self.items = NumberedItems(names, counts, labels, classes)
        self.classes = self.items.classes
        self._tables = tables
        self._groups = _Groups(tables)

    def read(self, item: Item) -> bytes:  # noqa: D102
        file, row = place_of(item)
        try:
            content = self._groups.row(file, row)
        except SourceError as error:
            raise UnreadableImageError(item.path, str(error)) from error
        if content is None:
            raise UnreadableImageError(
                item.path, f"row {row} of {shown(self._tables[file].path.name)} is without bytes"
            )
        if len(content) > MAX_FILE_BYTES:
            raise UnreadableImageError(item.path, too_large(len(content)))
        return content

    def reading_order(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Every table from front to back, one after the other, so that each row group is read once."""
        return positions[np.argsort(self.items.rows[positions])]

    @property
    def digest(self) -> str:  # noqa: D102
        digest = hashlib.blake2b(b"parquet", digest_size=16)
        for table in self._tables:
            digest.update(f"{table.path.name if len(self._tables) > 1 else ''} {table.mark()}\n".encode())
        return digest.hexdigest()


class _Groups:
    """Row groups, each read by one thread and used by all that need it."""

    def __init__(self, tables: Sequence["_Table"]) -> None:
        self._tables = tables
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Future[Any]] = OrderedDict()
        # What a thread is working on stays with it, however far the others are ahead.
        self._own = threading.local()

    def row(self, file: int, row: int) -> bytes | None:
        """The image in a row of a table.

        Raises:
            SourceError: its row group cannot be read.
        """
        table = self._tables[file]
        group = bisect_right(table.starts, row) - 1
        value = self._images(file, group)[row - table.starts[group]].as_py()
        return value["bytes"] if table.columns.nested and value is not None else value

    def _images(self, file: int, group: int) -> Any:
        key = (file, group)
        if getattr(self._own, "key", None) == key:
            return self._own.images
        with self._lock:
            known = self._kept.get(key)
            future = known or Future()
            self._kept[key] = future
            self._kept.move_to_end(key)
        if known is None:
            try:
                future.set_result(self._tables[file].images(group))
            except BaseException as error:
                future.set_exception(error)
                raise
            self._make_room()
        self._own.images = future.result()
        self._own.key = key
        return self._own.images

    def _make_room(self) -> None:
        """Forgets the row groups that were not needed for longest."""
        with self._lock:
            sizes = {key: _bytes_of(future) for key, future in self._kept.items()}
            held = sum(sizes.values())
            for key in list(sizes)[:-_KEPT]:
                if held > _KEPT_BYTES:
                    del self._kept[key]
                    held -= sizes[key]


def _bytes_of(future: Future[Any]) -> int:
    """Of a row group; 0 while it is being read, and where it could not be."""
    return future.result().nbytes if future.done() and future.exception() is None else 0


class _Table:
    """One file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = shown(path)
        self.size = regular_size(path)
        with self._opened() as file:
            self._metadata = file.metadata
            self.columns = _columns(file.schema_arrow, self.name)
        rows = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self.starts: list[int] = np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).tolist()

    @contextlib.contextmanager
    def _opened(self, metadata: Any = None) -> Iterator[Any]:
        arrow, parquet = _pyarrow("pyarrow"), _pyarrow("pyarrow.parquet")
        try:
            with parquet.ParquetFile(
                self.path, metadata=metadata, memory_map=False, pre_buffer=False
            ) as file:
                yield file
        except (OSError, arrow.ArrowException) as error:
            raise SourceError(f"{self.name}: cannot be read ({reason(error)}); fetch it anew") from error

    def images(self, group: int) -> Any:
        """The column of images in a row group."""
        column = self.columns.image
        with self._opened(self._metadata) as file:
            wanted = [f"{column}.bytes" if self.columns.nested else column]
            return file.read_row_group(group, columns=wanted, use_threads=False).column(column)

    def labels(self) -> np.ndarray | None:
        """The label of each row, a number or a name; None without."""
        if self.columns.label is None:
            return None
        with self._opened(self._metadata) as file:
            column = file.read(columns=[self.columns.label], use_threads=False).column(0)
            if _pyarrow("pyarrow").types.is_integer(column.type):
                return column.cast("int64").fill_null(-1).to_numpy()
            values = column.to_pylist()
        if None not in values:
            return np.array(values, np.str_)
        if any(value is not None for value in values):
            raise SourceError(
                f"{self.name}: row {values.index(None)} has no label, others have; label all images, or none"
            )
        return None

    def mark(self) -> str:
        """Names the content: size, footer (which has the sizes of all columns), a page from the middle."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.size - 8)
                footer = int.from_bytes(file.read(4), "little")
                file.seek(max(0, self.size - 8 - footer))
                crc = zlib.crc32(file.read(footer))
                file.seek(self.size // 2)
                return f"{self.size} {zlib.crc32(file.read(_PAGE), crc)}"
        except OSError as error:
            raise SourceError(f"{self.name}: cannot be read ({reason(error)})") from error


def _columns(schema: Any, name: str) -> _Columns:
    """Which columns of a table hold its images and labels."""
    types = _pyarrow("pyarrow").types
    features = _features(schema)
    fields = {field.name: field.type for field in schema}

    def is_bytes(kind: Any) -> bool:
        return types.is_binary(kind) or types.is_large_binary(kind)

    def of_type(feature: str) -> list[str]:
        return [name for name in fields if features.get(name, {}).get("_type") == feature]

    nested = [
        name
        for name, kind in fields.items()
        if types.is_struct(kind) and any(part.name == "bytes" and is_bytes(part.type) for part in kind)
    ]
    plain = [name for name, kind in fields.items() if is_bytes(kind)]
    images = [column for column in of_type("Image") if column in nested + plain]
    image = _preferred(
        images or nested or [column for column in plain if column in _IMAGES], _IMAGES, "images", name
    )
    if image is None:
        kinds = ", ".join(f"{shown(column)} ({shown(kind)})" for column, kind in list(fields.items())[:9])
        raise SourceError(
            f"{name}: no column of images among {kinds}; wanted image files as bytes or in structs"
        )
    numbers = [column for column, kind in fields.items() if types.is_integer(kind)]
    texts = [
        column for column, kind in fields.items() if types.is_string(kind) or types.is_large_string(kind)
    ]
    labels = [column for column in of_type("ClassLabel") if column in numbers]
    label = _preferred(
        labels or [column for column in numbers + texts if column in _LABELS], _LABELS, "labels", name
    )
    called = features.get(label, {}).get("names") if label in of_type("ClassLabel") else None
    names = tuple(map(str, called)) if isinstance(called, list) else ()
    distinct = len(set(names)) == len(names) > 0
    return _Columns(image, image in nested, label, names if distinct else None)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """What Hugging Face's `datasets` notes of each column; {} for other tables."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _preferred(columns: Sequence[str], order: Sequence[str], what: str, name: str) -> str | None:
    known = sorted((column for column in columns if column in order), key=order.index)
    if not known and len(columns) > 1:
        raise SourceError(
            f"{name}: {', '.join(map(shown, columns))} could all be the {what}; name one of them {order[0]}"
        )
    return next(iter(known or columns), None)


def _pyarrow(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"parquet tables need pyarrow, which cannot be imported ({shown(error)}); "
            "run: pip install 'nnflow[parquet]'"
        ) from error
