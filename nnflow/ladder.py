"""Ladders of resolutions: which images of a sum are weighed by how many of their coordinates.

levels ((64, 3000), (512, 100)):  all images by 64 coordinates, the best 3,000 of them again by 512, the
best 100 of those in pixels; what a level leaves behind stays with its weight there (the far field)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nnflow.errors import InputError


@dataclass(frozen=True)
class Ladder:
    """One way to take the sum.

    Attributes:
        levels: (coordinates, images passed on), coarse to fine; the last pass theirs on to the pixels.
        far: whether images left behind stay in the sum.
    """

    levels: tuple[tuple[int, int], ...]
    far: bool = True

    def __post_init__(self) -> None:
        ranks = [rank for rank, _ in self.levels]
        keeps = [keep for _, keep in self.levels]
        if not self.levels or min(ranks + keeps) < 1:
            raise InputError(
                f"levels {self.levels}: wanted pairs (coordinates, images passed on), at least 1"
            )
        if ranks != sorted(set(ranks)) or keeps != sorted(keeps, reverse=True):
            raise InputError(
                f"levels {self.levels}: wanted more coordinates and fewer images from one level to the next"
            )

    @classmethod
    def of(cls, levels: Sequence[tuple[int, int]]) -> "Ladder":
        """The ladder of these levels, with a far field.

        Raises:
            InputError: no levels, or not from coarse and many to fine and few.
        """
        return cls(tuple((int(rank), int(keep)) for rank, keep in levels))

    @classmethod
    def parse(cls, name: str) -> "Ladder":
        """The ladder that `str` calls `name`: "64/3000 512/100", "64/16 alone".

        Raises:
            InputError: no such name.
        """
        match = re.fullmatch(r"(\d{1,6}/\d{1,9}(?: \d{1,6}/\d{1,9})*)( alone)?", name)
        if match is None:
            raise InputError(f"ladder {name!r}: wanted a name such as '64/3000 512/100' or '64/16 alone'")
        pairs = [level.split("/") for level in match[1].split()]
        return cls(tuple((int(rank), int(keep)) for rank, keep in pairs), match[2] is None)

    def named(self, keep: int) -> str:
        """What it is called where the last level passes on `keep` images."""
        rank, _ = self.levels[-1]
        return str(Ladder((*self.levels[:-1], (rank, keep)), self.far))

    def __str__(self) -> str:
        text = " ".join(f"{rank}/{keep}" for rank, keep in self.levels)
        return text if self.far else f"{text} alone"
