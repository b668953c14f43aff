"""The table of errors, the choice it allows, and its measurement: against errors taken by hand."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import all_images, oracle, queries
from refusals import refused
from stores import store_of
from test_farfield import smooth
from torch import Tensor

from nnflow import calibrating, measuring, planning
from nnflow.calibrating import calibrate
from nnflow.calibration import CERTAIN, Calibration, Entry, Quantiles
from nnflow.errors import InputError, StoreError
from nnflow.index import NeighbourIndex
from nnflow.planning import Stretch, divided, seconds_of
from nnflow.velocity import EmpiricalVelocity

NONE = Quantiles(0.0, 0.0, 0.0, 0.0, 256)


def errors(p99: float) -> Quantiles:
    return Quantiles(p99 / 3, p99 / 2, p99, 1.1 * p99, 256)


def table(*rows: tuple[float, str, float, float], calls: dict[str, float] | None = None) -> Calibration:
    """Entries (t, ladder, seconds, p99); the exact field at 1 s everywhere."""
    entries = [Entry(t, name, seconds, errors(p99), None) for t, name, seconds, p99 in rows]
    entries += [Entry(t, "exact", 1.0, NONE, NONE) for t in sorted({row[0] for row in rows})]
    return Calibration(tuple(entries), "an index", calls or {}, {"seed": 0})


def chosen(costs: list[dict[str, float]], calls: dict[str, float]) -> tuple[str, ...]:
    """Ladders of parts of the time, of these seconds a batch; any second way is asked for all queries."""
    offers = [
        {
            name: Stretch(1.0, name, cost / 128, 1.0 if " else " in name else 0.0)
            for name, cost in some.items()
        }
        for some in costs
    ]
    return tuple(stretch.ladder for stretch in divided(offers, calls))


class TestPlan:
    def test_the_cheapest_that_met_the_tolerance_at_both_ends(self) -> None:
        found = table(
            (0.1, "64/9", 0.1, 0.005), (0.1, "512/9", 0.4, 0.001),
            (0.2, "64/9", 0.1, 0.02), (0.2, "512/9", 0.4, 0.004),
            (0.3, "64/9", 0.1, 0.02), (0.3, "512/9", 0.4, 0.02),
        ).plan(0.01)  # fmt: skip
        assert found.times == (0.1, 0.2, 0.3)
        assert found.ladders == ("64/9", "512/9", "exact", "exact")
        assert found.errors == (0.005, 0.004, 0.0, 0.0)

    def test_what_counts_is_the_upper_end_of_the_percentile(self) -> None:
        assert table((0.1, "64/9", 0.1, 0.0095)).plan(0.01).ladders == ("exact", "exact")
        assert table((0.1, "64/9", 0.1, 0.0090)).plan(0.01).ladders == ("64/9", "64/9")

    def test_a_call_costs_too(self) -> None:
        """128 queries in [.1, .2]: 3.8 s by the ladder that serves before and after, 2.6 s by the other."""
        rows = [
            (0.1, "64/9", 0.3, 0.001), (0.1, "128/9", 0.2, 0.001),
            (0.2, "64/9", 0.3, 0.001), (0.2, "128/9", 0.2, 0.001),
            (0.3, "64/9", 0.3, 0.001), (0.3, "128/9", 0.9, 0.001),
        ]  # fmt: skip
        assert table(*rows).plan(0.01).ladders == ("128/9", "128/9", "64/9", "64/9")
        few = {"64/9": 0.1, "128/9": 2.4}
        assert table(*rows, calls=few).plan(0.01).ladders == ("128/9", "128/9", "64/9", "64/9")
        many = {"64/9": 0.1, "128/9": 2.6}
        assert table(*rows, calls=many).plan(0.01).ladders == ("64/9", "64/9", "64/9", "64/9")

    def test_a_ladder_that_is_used_elsewhere_replaces_one_though_another_would_cost_less_here(self) -> None:
        costs = [{"64/8": 1.0, "64/30": 1.2, "512/100": 1.3}, {"512/100": 5.0}]
        assert chosen(costs, {"64/8": 3.0, "64/30": 3.0, "512/100": 3.0}) == ("512/100", "512/100")

    def test_a_ladder_no_other_can_replace_stays(self) -> None:
        found = table((0.1, "64/9", 0.1, 0.001), (0.2, "128/9", 0.1, 0.001), calls={"64/9": 9e9})
        assert found.plan(0.01).ladders == ("exact", "exact", "128/9")
        assert found.plan(0.001).ladders == ("exact", "exact", "exact")

    def test_a_ladder_measured_at_one_end_only_is_not_taken_between(self) -> None:
        found = table((0.1, "64/9", 0.1, 0.001), (0.2, "128/9", 0.2, 0.001)).plan(0.01)
        assert found.ladders == ("64/9", "exact", "128/9")

    def test_two_ways_in_turn_cost_the_calls_of_both_once(self) -> None:
        """ "64/9 alone" serves the second time by itself: there it is paid for, at the first time as well."""
        costs = [{"512/9": 4.0, "64/9 alone else 512/9": 2.0}, {"64/9 alone": 1.0, "512/9": 4.0}]
        both = ("64/9 alone else 512/9", "64/9 alone")
        assert chosen(costs, {"512/9": 1.0, "64/9 alone": 3.0}) == both
        assert chosen(costs, {"512/9": 1.0, "64/9 alone": 6.0}) == ("512/9", "512/9")
        parts = [Stretch(1.0, both[0], 0.0, 1.0), Stretch(1.0, both[1], 0.0, 0.0)]
        assert seconds_of(parts, {"512/9": 1.0, "64/9 alone": 3.0}) == pytest.approx(4)

    def test_a_call_that_few_batches_make_costs_little(self) -> None:
        """By drawing batches: the times of 128 queries, and which of them the first way has not settled."""
        parts = [
            Stretch(0.95, "64/9 alone else 512/9", 0.0, 0.004),
            Stretch(0.04, "64/9 alone else 512/20", 0.0, 0.05),
            Stretch(0.01, "exact", 0.0, 0.0),
        ]
        calls = {"64/9 alone": 1.0, "512/9": 10.0, "512/20": 12.0, "exact": 100.0}
        draw = torch.rand(20_000, 128, 2, generator=torch.Generator().manual_seed(0))
        t, chance = draw.unbind(2)
        again = ((t < 0.95) & (chance < 0.004)) | ((t >= 0.95) & (t < 0.99) & (chance < 0.05))
        late = t >= 0.99
        seconds = 1.0 * (~late).any(1) + 12.0 * again.any(1) + 100.0 * late.any(1)
        assert seconds_of(parts, calls) == pytest.approx(seconds.mean().item(), rel=0.01)

    def test_what_is_hardly_ever_asked_is_chosen_though_its_call_is_dear(self) -> None:
        for again, wanted in ((0.0005, "index/8 else 512/9"), (0.05, "64/9 alone")):
            entries = [
                Entry(0.5, "index/8 else 512/9", 0.1e-3, NONE, NONE, again),
                Entry(0.5, "64/9 alone", 0.3e-3, NONE, NONE),
                Entry(0.5, "exact", 1.0, NONE, NONE),
            ]
            found = Calibration(tuple(entries), "an index", {"512/9": 0.05, "exact": 1.0}, {}).plan(0.01)
            assert found.ladders == (wanted, wanted)

    def test_what_was_never_asked_may_be(self) -> None:
        """Of two second ways that no query needed the one of the cheaper call is named."""
        entries = [
            Entry(0.5, "index/8 else exact", 0.1e-3, NONE, NONE),
            Entry(0.5, "index/8 else 512/9", 0.1e-3, NONE, NONE),
            Entry(0.5, "exact", 1.0, NONE, NONE),
        ]
        found = Calibration(tuple(entries), "an index", {"512/9": 0.05, "exact": 1.0}, {}).plan(0.01)
        assert found.ladders == ("index/8 else 512/9",) * 2

    def test_the_tolerance_is_met_on_images_held_out_too(self) -> None:
        """By their 99th percentile as measured, being few; of the stored ones the upper end counts."""
        alone, turns = "64/9 alone", "64/9 alone else 512/9"
        for outside, wanted in ((0.011, turns), (0.0095, alone)):
            entries = (
                Entry(0.3, alone, 0.1, errors(0.001), errors(outside)),
                Entry(0.3, turns, 0.2, errors(0.002), errors(0.002)),
                Entry(0.3, "exact", 1.0, NONE, NONE),
            )
            found = Calibration(entries, "an index", {}, {}).plan(0.01)
            assert found.ladders == (wanted, wanted)
            assert found.errors[0] == (0.002 if wanted == turns else 0.001)

    def test_ways_of_one_scan_cost_one_call(self) -> None:
        """By ways alone 64/9 would stay for half of the time: 0.64 s, two calls, for 0.77 s of 512/9."""
        seconds = {"64/9": 0.004, "512/9": 0.006, "512/40": 0.008, "512/9 alone": 0.001}
        errors = {"64/9": (0.001, 0.1, 0.1), "512/9": (0.001, 0.001, 0.1), "512/40": (0.001, 0.001, 0.001)}
        entries = [
            Entry(t, name, seconds[name], Quantiles(0.0, 0.0, error, error, 256), None)
            for name in errors
            for t, error in zip((0.3, 0.5, 0.7), errors[name], strict=True)
        ]
        entries += [Entry(t, "exact", 0.1, Quantiles(0.0, 0.0, 0.0, 0.0, 256), None) for t in (0.3, 0.5, 0.7)]
        calls = {"64/9": 0.15, "512/9": 0.3, "512/40": 0.31}
        table = Calibration(tuple(entries), "an index", calls, {})
        assert table.plan(0.01).ladders == ("512/9", "512/9", "512/40", "512/40")
        plan = table.plan(0.01)
        queries = sum(128 * stretch.width * stretch.seconds for stretch in plan.stretches)
        assert table.price(plan.stretches) == pytest.approx((queries + 0.31) / 128)
        apart = Calibration(tuple(entries), "an index", calls | {"64/9": 0.05}, {})
        assert apart.plan(0.01).ladders == ("64/9", "512/9", "512/40", "512/40")

    def test_what_is_called_together(self) -> None:
        scans = {
            "64/9": "64",
            "64/9 alone": "64 alone",
            "64/9 of 80": "64 of 80",
            "64/99 512/9": "64/99 512",
            "64/99 512/9 rest of 200": "64/99 512 rest of 200",
            "index/8": "index/8",
            "exact": "exact",
        }
        assert {way: planning.scan_of(way) for way in scans} == scans
        found = planning.calls_of(
            ["64/9 alone else 512/9", "512/40", "64/40 alone", "64/9 alone else 64/99 alone"]
        )
        assert found["512/9"] == found["512/40"]
        assert found["64/40 alone"] == found["64/99 alone"] != found["64/9 alone"], "others follow that one"

    def test_how_many_images_a_way_keeps(self) -> None:
        ways = ("64/9", "64/30 alone", "512/100 of 65536", "64/99 512/9 rest of 200", "index/8", "exact")
        assert [planning.kept_by(way) for way in ways] == [9, 30, 100, 9, 0, 0]

    def test_names_of_two_ways(self) -> None:
        assert planning.ways_of(planning.in_turn("64/32 alone", "512/100")) == ("64/32 alone", "512/100")
        assert planning.ways_of("64/32 alone") == ("64/32 alone",)

    @pytest.mark.parametrize("tolerance", [0.0, -1.0, float("nan")])
    def test_no_tolerance(self, tolerance: float) -> None:
        with refused(InputError, "wanted a positive relative error"):
            table((0.1, "64/9", 0.1, 0.001)).plan(tolerance)


class TestQuantiles:
    @pytest.mark.parametrize(("count", "above"), [(64, 0), (229, 0), (256, 0), (400, 1), (1000, 5)])
    def test_the_upper_end_is_the_order_statistic_of_the_binomial(self, count: int, above: int) -> None:
        """How often fewer than so many of `count` draws exceed the true percentile, by drawing."""
        values = torch.rand(count, generator=torch.Generator().manual_seed(0))
        assert Quantiles.of(values).upper == values.double().sort().values[count - 1 - above].item()
        beyond = (torch.rand(20_000, count, generator=torch.Generator().manual_seed(1)) > 0.99).sum(1)
        trust = (beyond > above).double().mean().item()
        assert count < CERTAIN or trust > 0.89
        assert (beyond > above + 1).double().mean().item() < 0.91, "one more would have done"

    def test_quantiles(self) -> None:
        found = Quantiles.of(torch.arange(101).float())
        assert (found.p50, found.p90, found.p99, found.upper, found.queries) == (50, 90, 99, 100, 101)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    store = store_of(smooth(400), tmp_path_factory.mktemp("calibration"))
    return NeighbourIndex.build(store, store.folder, rank=40)


@pytest.fixture(scope="module")
def measured(index: NeighbourIndex) -> Calibration:
    """As on a machine where the exact field is dear and a ladder the cheaper the less it reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "answer", priced)
        patch.setattr(calibrating, "_TIMES", (0.02, 0.1, 0.3, 0.6))
        patch.setattr(calibrating, "_COLLAPSE", ())
        return calibrate(index, queries=256, seed=3)


_ANSWER = measuring.Bench.answer


def priced(bench: Any, way: Any, x: Tensor, t: Tensor, size: int = 64) -> tuple[Tensor, Tensor, float]:
    ladder = getattr(way, "ladder", None)
    price = 1.0 if ladder is None else sum(rank + keep for rank, keep in ladder.levels) / 1e4
    return *_ANSWER(bench, way, x, t, size)[:2], price


def test_errors_are_those_taken_by_hand(index: NeighbourIndex, measured: Calibration) -> None:
    """Other queries of the same kind, the exact answer in float64: the same quantiles but for chance."""
    for entry in measured.entries:
        if entry.ladder == "exact" or " else " in entry.ladder or entry.held_in.p50 < 1e-4:
            continue
        pairs = [tuple(map(int, level.split("/"))) for level in entry.ladder.split(" alone")[0].split()]
        field = EmpiricalVelocity.near_and_far(index, levels=pairs, device="cpu")  # type: ignore[arg-type]
        field = field.without_far() if "alone" in entry.ladder else field
        x, t = queries(index.store, entry.t, seed=9, count=256)
        wanted = oracle(all_images(index.store), x, t).flatten(1)
        found = (field(x, t).flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert entry.held_in.p50 == pytest.approx(found.median().item(), rel=0.25)
        assert entry.held_in.queries == 256
        assert entry.held_out is not None
        assert entry.held_out.queries == 64
    assert len({entry.ladder for entry in measured.entries}) > 5


@pytest.mark.parametrize("tolerance", [0.05, 0.01])
def test_a_tolerance_is_met_on_other_queries(
    index: NeighbourIndex, measured: Calibration, tolerance: float
) -> None:
    assert Calibration.open(index) == measured
    field = EmpiricalVelocity.near_and_far(index, tolerance=tolerance, device="cpu")
    used = set()
    for time in (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 0.99):
        x, t = queries(index.store, time, seed=11, count=200)
        estimate = field.estimate(x, t)
        wanted = oracle(all_images(index.store), x, t).flatten(1)
        error = (estimate.velocity.flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert error.quantile(0.98) <= tolerance, f"at {time} by {estimate.ladder[0]}"
        assert (estimate.error <= tolerance).all()
        assert (estimate.error > 0).all() or estimate.ladder[0] == "exact" or time > 0.3
        used |= set(estimate.ladder)
    assert len(used) > 1


def test_a_batch_of_many_times_is_answered_in_its_order(index: NeighbourIndex, measured: Calibration) -> None:
    field = EmpiricalVelocity.near_and_far(index, tolerance=0.02, device="cpu")
    asked = [queries(index.store, time, seed=7, count=5) for time in (0.5, 0.01, 0.12, 0.95)]
    together = field.estimate(torch.cat([x for x, _ in asked]), torch.cat([t for _, t in asked]))
    apart = [field.estimate(x, t) for x, t in asked]
    wanted = torch.cat([one.velocity for one in apart])
    torch.testing.assert_close(together.velocity, wanted, rtol=1e-3, atol=2e-3)
    assert together.ladder == sum((one.ladder for one in apart), ())
    torch.testing.assert_close(
        together.tail_mass, torch.cat([one.tail_mass for one in apart]), rtol=0.02, atol=1e-3
    )
    assert torch.equal(together.error, torch.cat([one.error for one in apart]))
    assert torch.equal(together.candidates, torch.cat([one.candidates for one in apart]))


def test_without_far_only_images_in_pixels_are_summed(index: NeighbourIndex, measured: Calibration) -> None:
    field = EmpiricalVelocity.near_and_far(index, tolerance=0.02, device="cpu").without_far()
    x, t = queries(index.store, 0.1, count=8)
    estimate = field.estimate(x, t)
    images = all_images(index.store)
    for row, ids in enumerate(estimate.ids):
        wanted = oracle(images[ids[ids >= 0]], x[row : row + 1], t[:1])
        torch.testing.assert_close(estimate.velocity[row : row + 1].double(), wanted, rtol=1e-3, atol=1e-3)


def test_one_seed_gives_one_set_of_errors(index: NeighbourIndex, measured: Calibration) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "answer", priced)
        patch.setattr(calibrating, "_TIMES", (0.1,))
        patch.setattr(calibrating, "_COLLAPSE", ())
        tables = [calibrate(index, queries=40, seed=seed).entries for seed in (0, 0, 1)]
    measured.save(index.folder / "calibration.json")
    assert tables[0] == tables[1] != tables[2]


def test_little_time_means_fewer_times(index: NeighbourIndex, measured: Calibration) -> None:
    """By a clock on which each takes 10 s: nine fit into 95 s; no fewer than six, no more than all."""
    asked, hand = measuring.Bench.ask, [0.0]

    def slow(*args: Any, **kwargs: Any) -> list[measuring.Asked]:
        hand[0] += 10
        return asked(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "answer", priced)
        patch.setattr(measuring.Bench, "ask", slow)
        patch.setattr(calibrating.time, "perf_counter", lambda: hand[0])
        counts = {seconds: calibrate(index, seconds=seconds).times for seconds in (10.0, 95.0, 1e4)}
    measured.save(index.folder / "calibration.json")
    all_times = calibrating._times(index.manifest["collapse_time"])
    assert [len(times) for times in counts.values()] == [6, 9, len(all_times)]
    for times in counts.values():
        assert (times[0], times[-1]) == (0.005, 0.99)
    assert all(entry.held_in.queries == 64 for entry in calibrate(index, seconds=1e-3).entries)


def test_little_time_means_no_ladder_better_than_a_percent(
    index: NeighbourIndex, measured: Calibration
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "answer", priced)
        patch.setattr(calibrating, "_TIMES", (0.02, 0.1, 0.3, 0.6))
        patch.setattr(calibrating, "_COLLAPSE", ())
        patch.setattr(calibrating, "_ALWAYS", set())
        patch.setattr(calibrating, "_HOPELESS", math.inf)
        few, many = (calibrate(index, queries=64, seconds=seconds) for seconds in (1e-3, 1e6))
    measured.save(index.folder / "calibration.json")
    assert few.times == many.times
    assert len(few.entries) < len(many.entries)
    assert few.plan(0.01).ladders == many.plan(0.01).ladders
    for table in (few, many):
        at = [{entry.ladder for entry in table.entries if entry.t == t} for t in table.times]
        for here, beside in [*pairwise(table.times), *pairwise(table.times[::-1])]:
            chosen = calibrating._cheapest([entry for entry in table.entries if entry.t == here])
            poor = {entry.ladder for entry in many.entries if entry.t == beside and entry.held_in.p50 > 0.005}
            assert chosen - poor <= at[table.times.index(beside)], "not asked at both ends of a stretch"


def made_up(t: float, **seconds: float) -> list[Entry]:
    """Ways of 0.5 % of error, those named `bad` of 2 %."""
    errors = {name: 0.02 if name.startswith("bad") else 0.005 for name in seconds}
    return [
        Entry(t, name, cost, Quantiles.of(torch.full((64,), errors[name])), None)
        for name, cost in seconds.items()
    ]


def test_times_that_cost_a_batch_most_are_measured_first() -> None:
    times = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    found: dict[float, list[Entry]] = {}
    order = []
    # good serves up to .4, cheap from there on; bad is right nowhere
    for _ in times:
        t = calibrating._next(times, found)
        late = {"cheap": 2 - t} if t >= 0.4 else {"bad": 0.1}
        found[t] = made_up(t, exact=100.0, good=10.0, **late)
        order.append(t)
    assert order == [0.0, 0.8, 0.4, 0.2, 0.1, 0.3, 0.6, 0.5, 0.7]
    assert (calibrating._next([0.1], {}), calibrating._next([0.1, 0.2], {0.1: []})) == (0.1, 0.2)


def test_what_is_always_asked_is_tried() -> None:
    assert calibrating._ALWAYS.issubset([*measuring.LADDERS, *measuring.SEARCHES])


def test_of_one_scan_those_that_keep_fewer_images_are_asked_first() -> None:
    """512/30 is the first that is timed, and reads its images from the disk."""
    costs = {"512/30": 9.0, "512/1000": 8.0, "512/300": 3.0, "64/9": 5.0, "64/9 alone": 6.0, "index/8": 4.0}
    ways = [*costs, "512/2000"]
    found = calibrating._by_cost(costs | {"512/2000": 7.0}, ways)
    assert found == ["512/30", "512/300", "index/8", "64/9", "64/9 alone", "512/1000", "512/2000"]


def test_what_lies_beside_a_time() -> None:
    assert calibrating._beside(0.3, {0.1: 0, 0.2: 0, 0.4: 0, 0.9: 0}) == [0.2, 0.4]
    assert calibrating._beside(0.3, {0.4: 0}) == [0.4]


def test_samples_are_tried_of_at_least_twice_as_many(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = len(index) // 2
    names = ("64/9", f"64/9 of {half}", f"64/9 of {half + 1}", f"64/9 rest of {half + 1}")
    monkeypatch.setattr(measuring, "LADDERS", names)
    bench = measuring.Bench(index, None, 1 << 26, 0)
    assert list(bench.ways) == list(names[:2])
    asked = bench.ask(0.02, 40, 0.0)[0]
    every, drawn = (bench.answered(bench.ways[name], asked, 0.0).errors.median() for name in bench.ways)
    assert 3 * every < drawn < 0.1


def test_a_small_set_is_the_exact_field(tmp_path: Path) -> None:
    """Nothing to save: every ladder would read all there is."""
    store = store_of(smooth(6), tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank=3)
    found = calibrate(index, queries=4)
    assert {entry.ladder for entry in found.entries} == {"exact"}
    x, t = queries(store, 0.3)
    estimate = EmpiricalVelocity.near_and_far(index, device="cpu").estimate(x, t)
    assert set(estimate.ladder) == {"exact"}
    assert (estimate.bound == 0).all()


def test_held_out_images_of_another_shape(index: NeighbourIndex, tmp_path: Path) -> None:
    other = store_of(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), tmp_path)
    with refused(InputError, r"held-out images of shape \(3, 4, 4\): wanted \(3, 7, 7\)"):
        calibrate(index, held_out=other)
    with refused(InputError, "queries = 1"):
        calibrate(index, queries=1)


def test_held_out_images_are_asked_for(index: NeighbourIndex, measured: Calibration, tmp_path: Path) -> None:
    """Noise is far from all stored images: its errors are those taken by hand, not of mirror images."""
    generator = torch.Generator().manual_seed(8)
    noise = torch.randint(0, 256, (30, 3, 7, 7), generator=generator, dtype=torch.uint8)
    other = store_of(noise, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring.Bench, "answer", priced)
        patch.setattr(calibrating, "_TIMES", (0.1,))
        patch.setattr(calibrating, "_COLLAPSE", ())
        mirrored, found = calibrate(index, queries=256), calibrate(index, queries=256, held_out=other)
    measured.save(index.folder / "calibration.json")
    assert found.about["held_out"] == other.fingerprint
    x, t = queries(other, 0.1, count=128)
    wanted = oracle(all_images(index.store), x, t).flatten(1)
    for ours, theirs in zip(found.entries, mirrored.entries, strict=True):
        assert ours.held_in == theirs.held_in
        if ours.ladder == "64/30":
            field = EmpiricalVelocity.near_and_far(index, k=30, rank=64, device="cpu")
            by_hand = ((field(x, t).flatten(1) - wanted).norm(dim=1) / wanted.norm(dim=1)).median().item()
            assert ours.held_out is not None
            assert ours.held_out != theirs.held_out
            assert ours.held_out.p50 == pytest.approx(by_hand, rel=0.2)
            return
    raise AssertionError("64/30 was not measured")


class TestFile:
    @pytest.fixture
    def file(self, index: NeighbourIndex, measured: Calibration) -> Any:
        path = index.folder / "calibration.json"
        measured.save(path)
        yield path
        measured.save(path)

    def test_what_was_saved_is_read(self, index: NeighbourIndex, measured: Calibration, file: Path) -> None:
        assert Calibration.open(index) == measured

    def test_none(self, index: NeighbourIndex, file: Path) -> None:
        file.unlink()
        with refused(StoreError, "has not been calibrated; run: nnflow calibrate"):
            EmpiricalVelocity.near_and_far(index, device="cpu")

    def test_of_another_index(self, index: NeighbourIndex, measured: Calibration, file: Path) -> None:
        replace(measured, index="another").save(file)
        with refused(StoreError, "measured on another index; run: nnflow calibrate"):
            Calibration.open(index)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"format": "nnflow-calibration-0"}, "wanted nnflow-calibration-2"),
            ({"entries": [{"t": 0.1}]}, "not a table"),
            ({"entries": 3}, "not a table"),
            ({"entries": []}, "a time without the exact field"),
        ],
    )
    def test_what_is_no_table(
        self, index: NeighbourIndex, file: Path, change: dict[str, Any], match: str
    ) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with refused(StoreError, f"{match}.*run: nnflow calibrate"):
            Calibration.open(index)
