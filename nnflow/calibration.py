"""What every ladder's error was at every time on this index, and the cheapest that meets a tolerance.

The table is measured (`calibrating`), kept as OUT/calibration.json, and read here: for a time between two
measured ones a ladder must have met the tolerance at both. What it states is a quantile over the queries of
the path from noise to data, not a bound for every query.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError, StoreError
from nnflow.files import quoted, read_json, shown, write_json
from nnflow.index import NeighbourIndex
from nnflow.planning import BATCH, EXACT, Plan, Stretch, divided, seconds_of

FORMAT = "nnflow-calibration-2"
FILE = "calibration.json"

_CONFIDENCE = 0.9  # that the true 99th percentile is no larger than the error a ladder is chosen by
# Queries of which the largest error is no smaller than the true percentile, at that confidence
CERTAIN = math.ceil(math.log(1 - _CONFIDENCE) / math.log(0.99))


@dataclass(frozen=True)
class Quantiles:
    """Relative velocity errors of `queries` queries.

    Attributes:
        p50: median.
        p90: 90th percentile.
        p99: 99th percentile.
        upper: the order statistic that is no smaller than the true 99th percentile with 90 % confidence;
            the largest where there are fewer than 230 queries.
        queries: how many.
    """

    p50: float
    p90: float
    p99: float
    upper: float
    queries: int

    @classmethod
    def of(cls, errors: Float[Tensor, " q"]) -> "Quantiles":
        """The quantiles of some errors."""
        values = errors.double().sort().values
        p50, p90, p99 = values.quantile(values.new_tensor([0.5, 0.9, 0.99])).tolist()
        count = len(values)
        above, chance = 0, 0.99**count  # of no more than `above` queries beyond the true percentile
        while True:
            more = chance + math.comb(count, above + 1) * 0.01 ** (above + 1) * 0.99 ** (count - above - 1)
            if more > 1 - _CONFIDENCE or above + 1 >= count:
                break
            above, chance = above + 1, more
        return cls(p50, p90, p99, values[count - 1 - above].item(), count)


@dataclass(frozen=True)
class Entry:
    """One ladder at one time: seconds per query beside the call, errors on stored and on other images.

    Of two ways in turn `again` is the share of the queries for which the second is asked.
    """

    t: float
    ladder: str
    seconds: float
    held_in: Quantiles
    held_out: Quantiles | None
    again: float = 0.0

    @property
    def error(self) -> float:
        """What is held against a tolerance: the 99th percentile, the larger of either kind of images'.

        Of stored images its upper end; of others, which are fewer, that of those measured.
        """
        return max(self.held_in.upper, self.held_out.p99 if self.held_out else 0.0)


@dataclass(frozen=True)
class Calibration:
    """The table, and of which index it speaks.

    Attributes:
        entries: by time, then in the order measured.
        index: what names the index: its store and embedding.
        calls: seconds that a call of each ladder takes however few its queries.
        about: how it was measured: seed, batch, threads, versions.
    """

    entries: tuple[Entry, ...]
    index: str
    calls: dict[str, float]
    about: dict[str, Any]

    @property
    def times(self) -> tuple[float, ...]:
        """Measured times, ascending."""
        return tuple(sorted({entry.t for entry in self.entries}))

    def plan(self, tolerance: float) -> Plan:
        """Ladders that met the tolerance, on images of the store and on others, as cheap as can be.

        Cheap for 128 queries at uniform times: each ladder that such a batch is divided among costs a call
        of its own, so one that is a little dearer per query may serve more of the time.

        Raises:
            InputError: a tolerance that is not a positive number.
        """
        if not tolerance > 0:
            raise InputError(f"tolerance = {tolerance:g}: wanted a positive relative error such as 0.01")
        parts = [self._at_both(width, ends) for width, ends in self._parts()]
        offers = [
            {
                name: stretch
                for name, (stretch, some) in part.items()
                if name == EXACT or all(entry.error <= tolerance for entry in some)
            }
            for part in parts
        ]
        chosen = divided(offers, self.calls)
        measured = [part[stretch.ladder][1] for part, stretch in zip(parts, chosen, strict=True)]
        errors = tuple(max(entry.held_in.p99 for entry in some) for some in measured)
        return Plan(self.times, chosen, errors)

    def always(self, ladder: str) -> tuple[Stretch, ...]:
        """One that was measured at every time, as the answer to all of them."""
        return tuple(self._at_both(width, ends)[ladder][0] for width, ends in self._parts())

    def _parts(self) -> list[tuple[float, tuple[float, ...]]]:
        """The parts into which the times divide [0, 1): how wide, and the measured times at their ends."""
        times = self.times
        ends = [(times[0],), *pairwise(times), (times[-1],)]
        widths = (later - earlier for earlier, later in pairwise((0.0, *times, 1.0)))
        return list(zip(widths, ends, strict=True))

    def _at_both(self, width: float, ends: Sequence[float]) -> dict[str, tuple[Stretch, list[Entry]]]:
        """The ladders measured at all `ends`, and what was found there."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.t in ends:
                found.setdefault(entry.ladder, []).append(entry)
        return {
            name: (
                Stretch(
                    width,
                    name,
                    sum(entry.seconds for entry in some) / len(some),
                    sum(entry.again for entry in some) / len(some),
                ),
                some,
            )
            for name, some in found.items()
            if len(some) == len(ends)
        }

    def price(self, stretches: Iterable[Stretch]) -> float:
        """Seconds per query of a batch at uniform times that these answer."""
        return seconds_of(stretches, self.calls) / BATCH

    def save(self, path: Path) -> None:
        """Writes the table as JSON."""
        write_json(
            path,
            {
                "format": FORMAT,
                "index": self.index,
                "calls": self.calls,
                "about": self.about,
                "entries": [asdict(entry) for entry in self.entries],
            },
        )

    @classmethod
    def open(cls, index: NeighbourIndex) -> "Calibration":
        """The calibration in an index's folder.

        Raises:
            StoreError: none there, not readable, or of another index.
        """
        path = index.folder / FILE
        again = f"run: nnflow calibrate {quoted(index.folder)}"
        if not path.exists():
            raise StoreError(f"{shown(path)}: this index has not been calibrated; {again}")
        values = read_json(path, "a calibration")
        if values.get("format") != FORMAT:
            raise StoreError(f"{shown(path)}: format {shown(values.get('format'))}, wanted {FORMAT}; {again}")
        if values.get("index") != name_of(index):
            raise StoreError(f"{shown(path)}: measured on another index; {again}")
        try:
            entries = tuple(_entry(value) for value in values["entries"])
            calls = {str(name): float(seconds) for name, seconds in values["calls"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{shown(path)}: not a table of errors ({shown(error)}); {again}") from error
        known = {entry.t for entry in entries if entry.ladder == EXACT}
        if not known or known != {entry.t for entry in entries}:
            raise StoreError(f"{shown(path)}: a time without the exact field, or none at all; {again}")
        return cls(entries, values["index"], calls, dict(values.get("about", {})))


def _entry(value: dict[str, Any]) -> Entry:
    outside = value["held_out"]
    return Entry(
        float(value["t"]),
        str(value["ladder"]),
        float(value["seconds"]),
        Quantiles(**value["held_in"]),
        None if outside is None else Quantiles(**outside),
        float(value["again"]),
    )


def name_of(index: NeighbourIndex) -> str:
    """What tells one index from another: its images and its embedding."""
    return f"{index.store.fingerprint} {index.manifest['embedding']}"
