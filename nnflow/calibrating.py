"""Measures ladders against the exact field at times from noise to data: the table of `calibration`.

Which times, and which ladders at each: those that cost a batch most are looked at most closely.
"""

import math
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from tqdm import tqdm

from nnflow.calibration import FILE, Calibration, Entry, Quantiles, name_of
from nnflow.errors import InputError
from nnflow.index import NeighbourIndex
from nnflow.measuring import AT_ONCE, FIRSTS, HELD_OUT, Answered, Bench
from nnflow.memory import DEFAULT_BUDGET
from nnflow.planning import EXACT, in_turn, kept_by, scan_of, ways_of
from nnflow.precision import full_float32
from nnflow.store import ImageStore

# Measured at every time: one ladder that serves two stretches saves a batch a call.
_ALWAYS = {
    *("64/30", "512/30", "512/100", "128/100 alone", "512/100 alone"),
    *("256/1000 512/200 rest of 131072", "256/2000 512/500 rest of 131072"),
    *FIRSTS,
}
_LEAST_SETTLED = 0.05  # share of the queries for which asking a first way may be worth its price
# Times are measured at these, and at these multiples of the estimated collapse time, around which
# the error of most ladders is largest.
_TIMES = (
    0.005,
    0.01,
    0.02,
    0.03,
    0.04,
    0.05,
    0.06,
    0.08,
    0.1,
    0.12,
    0.15,
    0.2,
    0.25,
    0.3,
    0.4,
    0.5,
    0.7,
    0.9,
)
_COLLAPSE = (0.5, 0.7, 0.85, 1.0, 1.15, 1.3, 1.6, 1.85)
_LAST = 0.99
_TOLERANCES = (0.05, 0.01, 0.003, 0.001)  # for which there is to be a ladder, also between two times
# Below which no dearer ladder is looked for: the larger one where the least there is to measure takes too
# long. Of 1,281,167 images at 64 x 64 all ladders take 64 queries of one time 94 s.
_FINEST, _COARSE = min(_TOLERANCES), 0.01
_HOPELESS = 0.1  # median error of the first batch above which the rest are not asked
_FEW = 16  # asked first where no more than 1 % is looked for: half of them worse, and the rest are not asked
_LEAST_QUERIES, _MOST_QUERIES = 64, 256
_LEAST_TIMES = 6  # measured however long it takes
_ROUNDS, _FOR_ROUNDS = 4, 0.1  # in which calls are timed; two, when more take this share of the seconds


@full_float32()
def calibrate(
    index: NeighbourIndex,
    *,
    held_out: ImageStore | None = None,
    queries: int | None = None,
    seconds: float = 300.0,
    seed: int = 0,
    memory: int = DEFAULT_BUDGET,
    progress: bool = False,
) -> Calibration:
    """Errors and times of all ladders against the exact field; writes OUT/calibration.json.

    Args:
        index: the index; its folder receives the table.
        held_out: a store of images not indexed; when None the mirror images of those indexed, of latents
            nothing.
        queries: per time; None for as many of 64 to 256 as `seconds` allow.
        seconds: about how long this may take. Where 64 queries at every time take longer, fewer times are
            measured, at least six, the ladders between them chosen the more carefully, and none are looked
            for that are right to more than 1 %.
        seed: of the queries.
        memory: working memory in bytes; beside it the queries and exact answers, 10 D bytes for each query
            of a time.
        progress: show a bar on stderr.

    Raises:
        InputError: fewer than 2 queries, or held-out images of another shape or scaling.
    """
    if queries is not None and queries < 2:
        raise InputError(f"queries = {queries}: wanted at least 2 per time, 256 for a 99th percentile")
    if held_out is not None and held_out.shape[1:] != index.store.shape[1:]:
        raise InputError(
            f"held-out images of shape {held_out.shape[1:]}: wanted {index.store.shape[1:]}, as those indexed"
        )
    if held_out is not None:
        index.store.refuse_other_units(held_out, "held-out images")
    began = time.perf_counter()
    bench = Bench(index, held_out, memory, seed)
    times = _times(float(index.manifest["collapse_time"]))
    costs, calls = _costs(bench, times[len(times) // 2], _FOR_ROUNDS * seconds)
    affordable = _affordable(costs, seconds / len(times))
    count = queries or max(_LEAST_QUERIES, min(_MOST_QUERIES, affordable))
    finest = _FINEST if affordable >= _LEAST_QUERIES else _COARSE
    order = _by_cost(costs, bench.ways)
    found: dict[float, _Time] = {}
    longest = 0.0
    for _ in tqdm(times, "calibrating", disable=not progress, unit="time"):
        before = time.perf_counter()
        if len(found) >= _LEAST_TIMES and before - began + longest > seconds:
            break
        t = _next(times, {t: here.entries() for t, here in found.items()})
        here = _Time(bench, t, count, calls, finest)
        here.climb(order)
        for beside in _beside(t, found):
            here.match(found[beside])
        found[t] = here
        longest = max(longest, time.perf_counter() - before)
    entries = tuple(entry for t in sorted(found) for entry in found[t].entries())
    about = {
        "seed": seed,
        "queries": count,
        "batch": AT_ONCE,
        "held_out": _others(bench),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    table = Calibration(entries, name_of(index), calls, about)
    table.save(index.folder / FILE)
    return table


def _others(bench: Bench) -> str:
    """What the held-out queries lead to."""
    if bench.held_out is not None:
        return bench.held_out.fingerprint
    return "mirror images" if bench.has_others else "none"


class _Time:
    """One time under measurement: the exact answers, and what the ways asked so far make of the queries."""

    def __init__(self, bench: Bench, t: float, count: int, calls: Mapping[str, float], finest: float) -> None:
        self._bench, self._t, self._count, self._calls, self._finest = bench, t, count, calls, finest
        self._sets = bench.ask(t, count, calls[EXACT])
        self._answers = {EXACT: [Answered.exactly(asked) for asked in self._sets]}
        self._hopeless: set[str] = set()

    def climb(self, order: Sequence[str]) -> None:
        """Asks ways in `order`, cheapest first, up to one as good as wanted, and those always asked."""
        met = False
        for name in order:
            if not met or name in _ALWAYS:
                met = self.measure(name) <= self._finest or met

    def match(self, other: "_Time") -> None:
        """Asks the cheapest ways of each time at the other: between two times one must serve at both."""
        for name in _cheapest(self.entries()):
            other.measure(name)
        for name in _cheapest(other.entries()):
            self.measure(name)

    def measure(self, name: str) -> float:
        """A way's `Entry.error`; inf where its first errors are hopeless."""
        if name not in self._answers and name not in self._hopeless:
            answers = self._ask(name)
            if answers is None:
                self._hopeless.add(name)
            else:
                self._answers[name] = answers
        return math.inf if name in self._hopeless else self._entry(name, self._answers[name]).error

    def _ask(self, name: str) -> list[Answered] | None:
        """All answers of a way, or none where the median of the first is hopeless."""
        way, call, (inside, *others) = self._bench.ways[name], self._calls[name], self._sets
        if self._finest == _COARSE:
            few = self._bench.answered(way, inside, call, slice(0, _FEW))
            if few.errors.median() > _COARSE:
                return None
        found = self._bench.answered(way, inside, call, slice(0, AT_ONCE))
        if found.errors.median() > _HOPELESS:
            return None
        if self._count > AT_ONCE:
            found = found.and_more(self._bench.answered(way, inside, call, slice(AT_ONCE, None)))
        return [found, *(self._bench.answered(way, other, call) for other in others)]

    def entries(self) -> list[Entry]:
        """The exact field, the ways asked, and pairs of them."""
        every = self._answers | _in_turn(self._answers)
        return [self._entry(name, answers) for name, answers in every.items()]

    def _entry(self, name: str, answers: Sequence[Answered]) -> Entry:
        """A way's line of the table."""
        inside, *outside = answers
        quantiles = [Quantiles.of(some.errors) for some in outside]
        held_in = Quantiles.of(inside.errors)
        held_out = quantiles[0] if quantiles else None
        return Entry(self._t, name, inside.seconds, held_in, held_out, inside.again)


def _in_turn(answers: Mapping[str, list[Answered]]) -> dict[str, list[Answered]]:
    """A cheap way, and a dearer one for what it has not settled: from the answers of each."""
    found = {}
    for first in [name for name in answers if name in FIRSTS]:
        if answers[first][0].settled.float().mean() < _LEAST_SETTLED:
            continue
        for name in [name for name in answers if name not in FIRSTS]:
            both = [one.then(other) for one, other in zip(answers[first], answers[name], strict=True)]
            saves = both[0].seconds < answers[name][0].seconds
            if saves and Quantiles.of(both[0].errors).upper <= max(_TOLERANCES):
                found[in_turn(first, name)] = both
    return found


def _costs(bench: Bench, t: float, patience: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds per query of every ladder and the exact field at one time, and seconds per call beside."""
    x, times = bench.queries(t, AT_ONCE, held_in=True)
    ways = bench.ways | {EXACT: bench.exact}
    # In turn, so that each call finds the caches as the one of another ladder has left them; the first
    # round takes memory and reads files, and is no measure.
    rounds: list[dict[str, float]] = []
    began = time.perf_counter()
    while len(rounds) < 2 or (len(rounds) < _ROUNDS and time.perf_counter() - began < patience):
        rounds.append({name: bench.answer(way, x[:2], times[:2])[2] for name, way in ways.items()})
    costs, calls = {}, {}
    for name, way in ways.items():
        few = min(turn[name] for turn in rounds[1:])  # what other processes take only adds
        costs[name] = bench.answer(way, x, times)[2]
        # T(q) = call + q m, from T(2) and T(64)
        calls[name] = max(0.0, 2 * AT_ONCE * (few - costs[name]) / (AT_ONCE - 2))
    return costs, calls


def _by_cost(costs: Mapping[str, float], ways: Iterable[str]) -> list[str]:
    """Ways from the cheapest on; of one scan, those that keep fewer images first.

    What was measured once may say otherwise: the first to keep so many reads them from the disk.
    """
    every = list(ways)

    def cost(way: str) -> tuple[float, int]:
        alike = [
            other for other in every if scan_of(other) == scan_of(way) and kept_by(other) >= kept_by(way)
        ]
        return min(costs[other] for other in alike), kept_by(way)

    return sorted(every, key=cost)


def _cheapest(entries: Sequence[Entry]) -> set[str]:
    """The ways of the cheapest ladder that meets each of some tolerances."""
    found: set[str] = set()
    for tolerance in _TOLERANCES:
        fit = [entry for entry in entries if entry.ladder != EXACT and entry.error <= tolerance]
        if fit:
            found.update(ways_of(min(fit, key=lambda entry: entry.seconds).ladder))
    return found


def _times(collapse: float) -> tuple[float, ...]:
    """Times to measure, none within 5 % of another."""
    wanted = {*_TIMES, _LAST, *(round(factor * collapse, 4) for factor in _COLLAPSE)}
    kept: list[float] = []
    for t in sorted(t for t in wanted if 0 < t <= _LAST):
        if not kept or t > 1.05 * kept[-1]:
            kept.append(t)
    return tuple(kept)


def _next(times: Sequence[float], found: Mapping[float, Sequence[Entry]]) -> float:
    """Which time to measure: both ends, then the middle of the stretch that costs a batch most so far."""
    for end in (times[0], times[-1]):
        if end not in found:
            return end

    def cost(stretch: tuple[int, int]) -> float:
        low, high = (times[place] for place in stretch)
        return (high - low) * _together(found[low], found[high])

    places = [place for place, t in enumerate(times) if t in found]
    low, high = max((gap for gap in pairwise(places) if gap[1] > gap[0] + 1), key=cost)
    return times[(low + high) // 2]


def _together(one: Sequence[Entry], other: Sequence[Entry]) -> float:
    """Seconds per query, at two times on average, of the cheapest way right to 1 % at both."""
    seconds = [
        {entry.ladder: entry.seconds for entry in some if entry.error <= _COARSE} for some in (one, other)
    ]
    return min(seconds[0][name] + seconds[1][name] for name in seconds[0].keys() & seconds[1].keys()) / 2


def _beside(t: float, measured: Iterable[float]) -> list[float]:
    """The nearest of the measured times before and after `t`."""
    before = sorted(time for time in measured if time < t)
    after = sorted(time for time in measured if time > t)
    return before[-1:] + after[:1]


def _affordable(costs: Mapping[str, float], seconds: float) -> int:
    """Queries that can be measured at one time in so many seconds."""
    # About half of the ladders are measured at a time; the others are hopeless there, or not needed.
    per_query = (1 + 1 / HELD_OUT) * (costs[EXACT] + sum(costs.values())) / 2
    return int(seconds / per_query) // AT_ONCE * AT_ONCE
