"""Ladders of resolutions: which images of a sum are weighed by how many of their coordinates.

levels ((64, 3000), (512, 100)):  all images by 64 coordinates, the best 3,000 of them again by 512, the
best 100 of those in pixels; what a level leaves behind stays with its weight there (the far field)

Early in time, where a good part of all images share the mass, a sample of them stands for all. Later one may
still stand for those that the first level leaves behind, which then only says which images come first.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nnflow.errors import InputError


@dataclass(frozen=True)
class Ladder:
    """One way to take the sum.

    Attributes:
        levels: (coordinates, images passed on), coarse to fine; the last pass theirs on to the pixels.
        far: whether images left behind stay in the sum.
        sample: how many images, drawn once, stand for all; None: all.
        rest: how many, drawn likewise, stand for those that the first level leaves behind; None: these do.
    """

    levels: tuple[tuple[int, int], ...]
    far: bool = True
    sample: int | None = None
    rest: int | None = None

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
        if self.drawn is not None and self.drawn <= max(keeps):
            raise InputError(f"a sample of {self.drawn} images: wanted more than the {max(keeps)} passed on")
        if self.rest is not None and (self.sample is not None or not self.far):
            raise InputError(f"ladder {self}: wanted a rest in a far field, and no other sample")

    @property
    def drawn(self) -> int | None:
        """Images of a sample, whatever it stands for."""
        return self.sample if self.rest is None else self.rest

    @classmethod
    def of(cls, levels: Sequence[tuple[int, int]]) -> "Ladder":
        """The ladder of these levels, with a far field.

        Raises:
            InputError: no levels, or not from coarse and many to fine and few.
        """
        return cls(tuple((int(rank), int(keep)) for rank, keep in levels))

    @classmethod
    def parse(cls, name: str) -> "Ladder":
        """The ladder that `str` calls `name`, such as "64/3000 512/100" or "64/16 alone".

        With a sample it is "512/30 of 65536", with one for the rest "512/300 rest of 262144".

        Raises:
            InputError: no such name.
        """
        levels = r"(\d{1,6}/\d{1,9}(?: \d{1,6}/\d{1,9})*)"
        match = re.fullmatch(levels + r"(?:( rest)? of (\d{1,9}))?( alone)?", name)
        if match is None:
            raise InputError(
                f"ladder {name!r}: wanted a name such as '64/3000 512/100', '64/16 alone', '512/30 of 65536'"
            )
        pairs = [level.split("/") for level in match[1].split()]
        drawn = None if match[3] is None else int(match[3])
        return cls(
            tuple((int(rank), int(keep)) for rank, keep in pairs),
            match[4] is None,
            sample=drawn if match[2] is None else None,
            rest=drawn if match[2] else None,
        )

    def named(self, keep: int) -> str:
        """What it is called where the last level passes on `keep` images."""
        rank, _ = self.levels[-1]
        return str(replace(self, levels=(*self.levels[:-1], (rank, keep))))

    def __str__(self) -> str:
        text = " ".join(f"{rank}/{keep}" for rank, keep in self.levels)
        sample = "" if self.sample is None else f" of {self.sample}"
        rest = "" if self.rest is None else f" rest of {self.rest}"
        return text + sample + rest + ("" if self.far else " alone")
