"""Some images of a source as a source of its own: of some classes, and at most so many at random."""

import difflib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int, Num, UInt8

from nnflow.errors import DegradedWarning, InputError
from nnflow.files import shown
from nnflow.sources.base import Item, Source

_NAMED = 5  # classes named in a message


def selected(
    source: Source, *, limit: int | None = None, classes: Sequence[str] | None = None, seed: int = 0
) -> Source:
    """The images of `classes`, and of these at most `limit`, drawn at random.

    The draws of one seed are nested: those of limit 100 are among those of limit 1,000. They depend
    on the seed and on the number of images alone.

    Args:
        source: all images; closed with what is returned.
        limit: images kept, at least 1; more than there are keeps all, with a `DegradedWarning`.
        classes: names, or numbers without their leading zeros; all classes by default.
        seed: of the draw, 0 or more.

    Raises:
        InputError: a class that the source has not, or an argument out of range.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: wanted at least one image")
    if seed < 0:
        raise InputError(f"seed {seed}: wanted 0 or more")
    if classes is not None and not classes:
        raise InputError("no classes chosen: wanted at least one, or None for all")
    positions = np.arange(len(source.items))
    if classes is not None:
        wanted = {_class_of(name, source.classes) for name in classes}
        positions = np.array([i for i, item in enumerate(source.items) if item.group in wanted], np.int64)
    if limit is not None and limit > len(positions):
        warnings.warn(
            f"limit {limit}: there are only {len(positions)} images, all are taken",
            DegradedWarning,
            stacklevel=2,
        )
    if limit is not None and limit < len(positions):
        positions = positions[drawn(len(positions), limit, seed=seed)]
    return source if len(positions) == len(source.items) else _Subset(source, positions)


def drawn(count: int, limit: int, *, seed: int) -> Int[np.ndarray, " n"]:
    """Ascending numbers below `count`, `limit` of them; the draws of one seed are nested."""
    # Raw output of the generator: unlike its distributions, the same in every release of numpy.
    keys = np.random.PCG64(seed).random_raw(count)
    return np.sort(np.argsort(keys, kind="stable")[:limit])


class _Subset(Source):
    """The items of another source at ascending positions."""

    def __init__(self, source: Source, positions: Int[np.ndarray, " n"]) -> None:
        self.path = source.path
        self.items = _Chosen(source.items, positions)
        present = {item.group for item in self.items}
        self.classes = tuple(name for name in source.classes if name in present)
        self.latents = source.latents
        self._source = source
        self._positions = positions

    def read(self, item: Item) -> bytes | UInt8[np.ndarray, "H W *C"]:
        return self._source.read(item)

    @property
    def digest(self) -> str:
        digest = hashlib.blake2b(self._source.digest.encode(), digest_size=16)
        digest.update(self._positions.astype("<i8").tobytes())
        return digest.hexdigest()

    def reading_order(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        ordered = self._source.reading_order(self._positions[positions])
        return np.searchsorted(self._positions, ordered)

    def holds(self, shape: tuple[int, int, int]) -> bool:
        return self._source.holds(shape)

    def block(self, positions: Int[np.ndarray, " n"]) -> Num[np.ndarray, "n C H W"]:
        return self._source.block(self._positions[positions])

    def close(self) -> None:
        self._source.close()


class _Chosen(Sequence[Item]):
    def __init__(self, items: Sequence[Item], positions: Int[np.ndarray, " n"]) -> None:
        self._items = items
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self._items[row] for row in self._positions[position].tolist()]
        return self._items[int(self._positions[position])]

    def __iter__(self) -> Iterator[Item]:
        return (self._items[row] for row in self._positions.tolist())


def _class_of(name: str, classes: Sequence[str]) -> str:
    """The class called `name`, or so numbered.

    Raises:
        InputError: none is.
    """
    if name in classes:
        return name
    if name.isdecimal() and classes and (padded := name.zfill(len(classes[0]))) in classes:
        return padded
    if not classes:
        raise InputError(f"class '{shown(name)}': the images of this source have no classes")
    near = difflib.get_close_matches(name, classes, _NAMED, cutoff=0.3) or classes[:_NAMED]
    raise InputError(
        f"class '{shown(name)}': not among the {len(classes)} of this source; the nearest are "
        f"{', '.join(shown(known) for known in near)}"
    )
