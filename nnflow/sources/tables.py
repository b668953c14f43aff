"""Images that are numbered rows of a few files (arrays, tables), as items of a source.

An item of 1.3 million is made when it is asked for: kept are its row and its class, 12 bytes. Its
path is the row's number, `000042` of one file and `train_data_batch_1.npz/000042` of several.
"""

import math
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from jaxtyping import Int

from nnflow.errors import SourceError
from nnflow.files import shown
from nnflow.sources.base import Item, padded

_PLACE = struct.Struct("<IQ")  # of an item: file, row within it
_AT_ONCE = 4096  # items made at a time when all are gone through


class NumberedItems(Sequence[Item]):
    """The rows of `names`, by class and then as they stand in the files.

    Attributes:
        classes: names of the classes that have rows, sorted; () without.
        starts: (files + 1,) rows before each file.
        rows: (n,) int64, for each item its row, counted through all files.
        labels: (n,) int32, for each row, not item, its class; -1 without.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: Sequence[int],
        labels: Int[np.ndarray, " n"] | None,
        classes: Sequence[str],
        *,
        size: int = 0,
    ) -> None:
        """Orders the rows.

        Args:
            names: of the files, in their order.
            counts: rows of each.
            labels: into `classes`, of all rows; None without classes.
            classes: names by label; sorted here.
            size: bytes of one image, where they are all the same.
        """
        self._names = [f"{name}/" for name in names] if len(names) > 1 else [""]
        self._digits = len(str(max(counts, default=1) - 1))
        self._size = size
        self.starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self.classes: tuple[str, ...] = ()
        self.labels = np.full(self.starts[-1], -1, np.int32)
        if labels is not None:
            present = np.unique(labels).tolist()
            self.classes = tuple(sorted({classes[label] for label in present}))
            numbers = {name: number for number, name in enumerate(self.classes)}
            renumbered = np.zeros(len(classes), np.int32)
            renumbered[present] = [numbers[classes[label]] for label in present]
            self.labels = renumbered[labels]
        self.rows = np.argsort(self.labels, kind="stable")

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self._item(row) for row in self.rows[position].tolist()]
        return self._item(int(self.rows[position]))

    def __iter__(self) -> Iterator[Item]:
        for first in range(0, len(self), _AT_ONCE):
            yield from self[first : first + _AT_ONCE]

    def _item(self, row: int) -> Item:
        file = bisect_right(self.starts, row) - 1
        within = row - self.starts[file]
        path = f"{self._names[file]}{within:0{self._digits}d}"
        label = self.labels[row]
        group = self.classes[label] if label >= 0 else None
        return Item(path, group, self._size, _PLACE.pack(file, within))

    def files_of(self, positions: Int[np.ndarray, " n"]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """For each file among `positions`: its number, which of them are in it, their rows within it."""
        rows = self.rows[positions]
        files = np.searchsorted(self.starts, rows, side="right") - 1
        for file in np.unique(files).tolist():
            chosen = np.flatnonzero(files == file)
            yield file, chosen, rows[chosen] - self.starts[file]


def place_of(item: Item) -> tuple[int, int]:
    """The number of an item's file, and its row in it."""
    file, row = _PLACE.unpack(item.place)
    return file, row


def classed(
    labels: Sequence[np.ndarray | None],
    names: Sequence[str],
    source: Path,
    *,
    called: Sequence[str] | None = None,
) -> tuple[np.ndarray | None, Sequence[str]]:
    """The labels of several files as one array into a list of class names.

    Integers name their classes, zero-padded so that they sort as numbers; texts are names. -1, as
    test sets have it, is no label.

    Args:
        labels: of each file, one-dimensional, of integers or texts; None where it has none.
        names: of the files, for the message.
        source: for the message.
        called: names of the labels 0, 1, ... where the files give them.

    Raises:
        SourceError: labels in some rows and not in others, naming the first, or labels out of range.
    """
    found = [None if values is None or _all_missing(values) else values for values in labels]
    if all(values is None for values in found):
        return None, []
    for name, values in zip(names, found, strict=True):
        if values is None:
            raise SourceError(
                f"{shown(source)}: {shown(name)} has no labels, others have; give all of them labels, or none"
            )
        if values.dtype.kind in "iu":
            _refuse_outside(values, shown(name), source, len(called) if called else None)
    every = np.concatenate([values for values in found if values is not None])
    if called:
        return every, called
    present, numbers = np.unique(every, return_inverse=True)
    return numbers, padded([str(value) for value in present.tolist()])


def _refuse_outside(values: Int[np.ndarray, " n"], name: str, source: Path, below: int | None) -> None:
    wrong = np.flatnonzero((values < 0) | (values >= (math.inf if below is None else below)))
    if len(wrong):
        wanted = "0 or more" if below is None else f"0 to {below - 1}, which have names"
        first = values[wrong[0]]
        told = "no label (none, or -1)" if first == -1 else f"the label {first}"
        raise SourceError(
            f"{shown(source)}: row {wrong[0]} of {name} has {told}, others have classes; wanted {wanted}"
        )


def _all_missing(values: np.ndarray) -> bool:
    return values.dtype.kind in "iu" and len(values) > 0 and bool((values == -1).all())
