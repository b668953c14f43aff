"""Which ladder answers when, so that a batch at uniform times is cheap.

A batch is divided among the ladders of its times, and each ladder is a call that costs something however few
its queries are. So a ladder that is a little dearer per query may serve more of the time.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

EXACT = "exact"
BATCH = 128  # queries at uniform times whose cost a plan makes small: a usual training batch
# Of the path's own queries one in 1,000 fails the test of `planned.settled` though it has settled.
_AGAIN = 1e-3
_ELSE = " else "
_LADDER = re.compile(r"((?:\d+/\d+ )*\d+)/(\d+)((?:(?: rest)? of \d+)?(?: alone)?)")


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
class Stretch:
    """A part of [0, 1), and a ladder that may answer it.

    Attributes:
        width: of the part.
        ladder: one way, or two in turn.
        seconds: per query, beside those of the call.
        again: share of the queries for which the second of two ways is asked; 0 of one way.
    """

    width: float
    ladder: str
    seconds: float
    again: float

    @property
    def asked(self) -> Iterable[tuple[str, float]]:
        """Each of its ways, and how many queries of a batch fall to it."""
        queries = BATCH * self.width
        return zip(ways_of(self.ladder), (queries, queries * max(self.again, _AGAIN)), strict=False)


def seconds_of(stretches: Iterable[Stretch], calls: Mapping[str, float]) -> float:
    """Seconds of a batch at uniform times: those of its queries, and of the calls that these need.

    Where m queries are expected at least one comes, and a call is made, with a chance of 1 - exp(-m).
    """
    stretches = list(stretches)
    together = calls_of(stretch.ladder for stretch in stretches)
    dearest: dict[tuple[str, bool], float] = {}
    expected: dict[tuple[str, bool], float] = {}
    for stretch in stretches:
        for way, queries in stretch.asked:
            call = together[way]
            dearest[call] = max(dearest.get(call, 0.0), calls.get(way, 0.0))
            expected[call] = expected.get(call, 0.0) + queries
    called = (-math.expm1(-expected[call]) * seconds for call, seconds in dearest.items())
    return sum(BATCH * stretch.width * stretch.seconds for stretch in stretches) + sum(called)


def divided(offers: Sequence[Mapping[str, Stretch]], calls: Mapping[str, float]) -> tuple[Stretch, ...]:
    """One of the `offers` by name for each part of the time, of small `seconds_of` together.

    From the cheapest of each, ways are given up one by one or all of a scan, for any other or for one that is
    used already, while that makes the whole cheaper: the best of all divisions is one of many thousands, and
    this is at most a few per cent from it.
    """

    def cheapest(ways: set[str]) -> tuple[tuple[Stretch, ...], float]:
        chosen = tuple(
            min(
                (stretch for name, stretch in some.items() if ways.issuperset(ways_of(name))),
                key=lambda stretch: stretch.seconds,
            )
            for some in offers
        )
        return chosen, seconds_of(chosen, calls)

    def suffice(ways: set[str]) -> bool:
        return all(any(ways.issuperset(ways_of(name)) for name in some) for some in offers)

    ways = {way for some in offers for name in some for way in ways_of(name)}
    best, least = cheapest(ways)
    while True:
        used = {way for stretch in best for way in ways_of(stretch.ladder)}
        alike = [{other for other in ways if scan_of(other) == scan_of(way)} for way in sorted(used)]
        given_up = [{way} for way in sorted(used)] + alike
        fewer = [some - those for those in given_up for some in (ways, used)]
        tried = [(*cheapest(some), some) for some in fewer if suffice(some)]
        if not tried or min(whole for _, whole, _ in tried) >= least:
            return best
        best, least, ways = min(tried, key=lambda one: one[1])


@dataclass(frozen=True)
class Plan:
    """Which ladder answers when: the first of the `stretches` before `times[0]`, then one from each time on.

    `errors` are the 99th percentiles that were measured for them there.
    """

    times: tuple[float, ...]
    stretches: tuple[Stretch, ...]
    errors: tuple[float, ...]

    @property
    def ladders(self) -> tuple[str, ...]:
        """Of each stretch."""
        return tuple(stretch.ladder for stretch in self.stretches)
