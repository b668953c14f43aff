"""What every ladder's error was at every time on this index, and the cheapest that meets a tolerance.

The table is measured (`calibrating`), kept as OUT/calibration.json, and read here: for a time between two
measured ones a ladder must have met the tolerance at both. What it states is a quantile over the queries of
the path from noise to data, not a bound for every query.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError, StoreError
from nnflow.files import read_json, shown, write_json
from nnflow.index import NeighbourIndex

FORMAT = "nnflow-calibration-1"
FILE = "calibration.json"
EXACT = "exact"
_ELSE = " else "
_LADDER = re.compile(r"((?:\d+/\d+ )*\d+)/(\d+)((?:(?: rest)? of \d+)?(?: alone)?)")

_CONFIDENCE = 0.9  # that the true 99th percentile is no larger than the error a ladder is chosen by
# Queries of which the largest error is no smaller than the true percentile, at that confidence
CERTAIN = math.ceil(math.log(1 - _CONFIDENCE) / math.log(0.99))
BATCH = 128  # queries at uniform times whose cost a plan makes small: a usual training batch


def ways_of(ladder: str) -> tuple[str, ...]:
    """The ways a query may be summed under this name, in turn: of "64/32 alone else 512/100" there are two.

    The second takes those queries that the first has not settled (`planned`).
    """
    return tuple(ladder.split(_ELSE))


def scan_of(way: str) -> str:
    """What two ways have in common that weigh the same images by the same coordinates: "512" of "512/300".

    They differ in how many images go on to the pixels, and queries of both are scanned together (`planned`).
    """
    match = _LADDER.fullmatch(way)
    return way if match is None else match[1] + match[3]


def kept_by(way: str) -> int:
    """Images that a ladder reads in pixels, 100 of "512/100"; 0 of other ways."""
    match = _LADDER.fullmatch(way)
    return 0 if match is None else int(match[2])


def calls_of(ladders: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Which of the ways that a batch divided among `ladders` takes are called together: those of equal value.

    Those that another follows are called before all others, also of the same scan.
    """
    turns = [ways_of(name) for name in ladders]
    firsts = {turn[0] for turn in turns if len(turn) > 1}
    return {way: (scan_of(way), way in firsts) for turn in turns for way in turn}


def in_turn(first: str, then: str) -> str:
    """The name of `first`, and `then` for those it does not settle."""
    return f"{first}{_ELSE}{then}"


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
    """One ladder at one time: seconds per query beside the call, errors on stored and on other images."""

    t: float
    ladder: str
    seconds: float
    held_in: Quantiles
    held_out: Quantiles | None

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

    def plan(self, tolerance: float) -> "Plan":
        """Ladders that met the tolerance, on images of the store and on others, as cheap as can be.

        Cheap for 128 queries at uniform times: each ladder that such a batch is divided among costs a call
        of its own, so one that is a little dearer per query may serve more of the time.

        Raises:
            InputError: a tolerance that is not a positive number.
        """
        if not tolerance > 0:
            raise InputError(f"tolerance = {tolerance:g}: wanted a positive relative error such as 0.01")
        times = self.times
        ends = [(times[0],), *pairwise(times), (times[-1],)]
        widths = [times[0], *(later - earlier for earlier, later in pairwise(times)), 1 - times[-1]]
        fits = [self._fitting(some, tolerance) for some in ends]
        costs = [
            {name: BATCH * width * fit.seconds for name, fit in some.items()}
            for width, some in zip(widths, fits, strict=True)
        ]
        chosen = _divided(costs, self.calls)
        errors = tuple(fit[name].error for name, fit in zip(chosen, fits, strict=True))
        return Plan(times, chosen, errors)

    def _fitting(self, ends: Sequence[float], tolerance: float) -> dict[str, "_Fit"]:
        """Ladders that meet the tolerance at all `ends`."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.t in ends and (entry.ladder == EXACT or entry.error <= tolerance):
                found.setdefault(entry.ladder, []).append(entry)
        return {
            name: _Fit(
                sum(entry.seconds for entry in some) / len(some),
                max(entry.held_in.p99 for entry in some),
            )
            for name, some in found.items()
            if len(some) == len(ends)
        }

    def call(self, ladders: Iterable[str]) -> float:
        """Seconds per query of a batch that is divided among `ladders`, beside those of its queries."""
        return _called(ladders, self.calls) / BATCH

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
        again = f"run: nnflow calibrate {shown(index.folder)}"
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


@dataclass(frozen=True)
class _Fit:
    """A ladder between two times: seconds per query beside the call, largest p99 held in."""

    seconds: float
    error: float


def _sum_of(chosen: Iterable[str], costs: Sequence[Mapping[str, float]]) -> float:
    return sum(cost[name] for cost, name in zip(costs, chosen, strict=True))


def _called(chosen: Iterable[str], calls: Mapping[str, float]) -> float:
    """Seconds of the calls that these ladders take."""
    dearest: dict[tuple[str, bool], float] = {}
    for way, call in calls_of(chosen).items():
        dearest[call] = max(dearest.get(call, 0.0), calls.get(way, 0.0))
    return sum(dearest.values())


def _divided(costs: Sequence[Mapping[str, float]], calls: Mapping[str, float]) -> tuple[str, ...]:
    """One of the names of each of `costs`, of small sum with the `calls` of all ways they take.

    From the cheapest of each, ways are given up one by one or all of a scan, for any other or for one that is
    used already, while that makes the whole cheaper: the best of all divisions is one of many thousands, and
    this is at most a few per cent from it.
    """

    def cheapest(ways: set[str]) -> tuple[tuple[str, ...], float]:
        chosen = tuple(
            min((name for name in cost if ways.issuperset(ways_of(name))), key=cost.__getitem__)
            for cost in costs
        )
        return chosen, _sum_of(chosen, costs) + _called(chosen, calls)

    def suffice(ways: set[str]) -> bool:
        return all(any(ways.issuperset(ways_of(name)) for name in cost) for cost in costs)

    ways = {way for cost in costs for name in cost for way in ways_of(name)}
    best, least = cheapest(ways)
    while True:
        used = {way for name in best for way in ways_of(name)}
        alike = [{other for other in ways if scan_of(other) == scan_of(way)} for way in sorted(used)]
        given_up = [{way} for way in sorted(used)] + alike
        fewer = [some - those for those in given_up for some in (ways, used)]
        tried = [(*cheapest(some), some) for some in fewer if suffice(some)]
        if not tried or min(whole for _, whole, _ in tried) >= least:
            return best
        best, least, ways = min(tried, key=lambda one: one[1])


def _entry(value: dict[str, Any]) -> Entry:
    outside = value["held_out"]
    return Entry(
        float(value["t"]),
        str(value["ladder"]),
        float(value["seconds"]),
        Quantiles(**value["held_in"]),
        None if outside is None else Quantiles(**outside),
    )


def name_of(index: NeighbourIndex) -> str:
    """What tells one index from another: its images and its embedding."""
    return f"{index.store.fingerprint} {index.manifest['embedding']}"


@dataclass(frozen=True)
class Plan:
    """Which ladder answers when: `ladders[0]` before `times[0]`, `ladders[i]` from `times[i - 1]` on.

    `errors` are the 99th percentiles that were measured for them there.
    """

    times: tuple[float, ...]
    ladders: tuple[str, ...]
    errors: tuple[float, ...]
