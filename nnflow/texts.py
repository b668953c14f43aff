"""Many strings as one block of bytes, as images.h5 keeps them."""

from collections.abc import Sequence
from typing import overload

import numpy as np


class Texts(Sequence[str]):
    """Many strings as one block of bytes: 1.3 million paths take their length and 8 bytes each."""

    def __init__(self, block: bytes, ends: np.ndarray) -> None:
        self._block = block
        self._ends = ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Texts":
        """Packs `texts`, lone surrogates (undecodable bytes of file names) included."""
        coded = [text.encode("utf-8", "surrogateescape") for text in texts]
        return cls(b"".join(coded), np.cumsum([len(code) for code in coded], dtype=np.int64))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The block as uint8 and the end of each text within it."""
        return np.frombuffer(self._block, np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = range(len(self))[row]  # negative rows, IndexError
        start = int(self._ends[row - 1]) if row else 0
        return self._block[start : int(self._ends[row])].decode("utf-8", "surrogateescape")
