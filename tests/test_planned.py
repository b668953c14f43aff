"""Which way answers which query: one after the other, each called once, and what calibration says of it."""

from pathlib import Path

import pytest
import torch
from contract import all_images, oracle, queries
from stores import store_of
from test_calibration import priced
from test_farfield import smooth
from torch import Tensor

from nnflow import calibrating, measuring
from nnflow.calibration import Calibration
from nnflow.index import NeighbourIndex
from nnflow.ladder import Ladder
from nnflow.path import interpolate
from nnflow.pixels import PixelRows
from nnflow.planned import Calibrated, looked_at, settled, support_of
from nnflow.planning import Plan, Stretch, ways_of
from nnflow.products import Scores, scores_of
from nnflow.support import Part, Support
from nnflow.velocity import EmpiricalVelocity
from nnflow.weighted import WeightedMean

BUDGET = 1 << 28


class Fake(Support):
    """Answers with its number; says that queries whose first value is below `limit` are one image."""

    def __init__(self, number: float, limit: float) -> None:
        super().__init__(PixelRows(torch.zeros(9, 3, dtype=torch.uint8)), budget=BUDGET)
        self.number, self.limit, self.asked = number, limit, []  # type: ignore[var-annotated]

    def part(self, x: Tensor, t: Tensor, images: slice) -> Part:
        self.asked.append(x[:, 0].tolist())
        ess = torch.where(x[:, 0] < self.limit, 1.0199, 1.0201).double()
        mass = x[:, 2].double() if x[:, 2].min() < 0 else torch.zeros(len(x)).double()
        weighted = WeightedMean(mass, 2 * mass - ess.log(), torch.full_like(x, self.number))
        return Part.summed(weighted, str(self.number), ids=torch.zeros(len(x), 1, dtype=torch.int64))

    def reach(self, mean: Tensor) -> Tensor:
        return torch.zeros(len(mean)).double()


def plan_of(times: tuple[float, ...], ladders: tuple[str, ...], errors: tuple[float, ...]) -> Plan:
    """Each way at the same price."""
    return Plan(times, tuple(Stretch(1 / len(ladders), name, 1.0, 0.0) for name in ladders), errors)


def planned(plan: Plan, ways: dict[str, Support]) -> Calibrated:
    return Calibrated(next(iter(ways.values())).rows, plan, ways, torch.eye(3), budget=BUDGET)


def asked(field: Calibrated, values: list[float], times: list[float]) -> Part:
    x = torch.tensor(values)[:, None].expand(-1, 3).contiguous()
    return field.part(x, torch.tensor(times), slice(0, 9))


def test_what_the_first_way_has_not_settled_goes_to_the_second_with_all_others() -> None:
    cheap, dear = Fake(1.0, limit=0.5), Fake(2.0, limit=0.0)
    plan = plan_of((0.2, 0.4), ("dear", "cheap else dear", "cheap"), (0.01, 0.02, 0.03))
    field = planned(plan, {"dear": dear, "cheap": cheap})
    found = asked(field, [0.1, 0.2, 0.6, 0.7, 0.8], [0.1, 0.3, 0.3, 0.5, 0.19])
    assert cheap.asked == [pytest.approx([0.2, 0.6, 0.7])], "each way is called once"
    assert dear.asked == [pytest.approx([0.1, 0.6, 0.8])]
    assert found.weighted.mean[:, 0].tolist() == [2, 1, 2, 1, 2]
    assert found.ladders == ("2.0", "1.0", "2.0", "1.0", "2.0")
    assert found.errors.tolist() == [0.01, 0.02, 0.02, 0.03, 0.01]
    assert asked(field, [0.6], [0.3]).weighted.mean[0, 0] == 2, "alone as in a batch"


def test_a_way_that_is_first_here_and_second_there() -> None:
    ways: dict[str, Support] = {"a": Fake(0.0, 0.5), "b": Fake(0.25, 0.5), "c": Fake(0.5, 0.5)}
    field = planned(plan_of((0.5,), ("a else b", "b else c"), (0.0, 0.0)), ways)
    found = asked(field, [0.1, 0.9, 0.1, 0.9], [0.1, 0.1, 0.9, 0.9])
    assert found.weighted.mean[:, 0].tolist() == [0, 0.25, 0.25, 0.5]


def test_of_two_alike_the_one_outweighed_is_not_asked_again() -> None:
    """The mass of a fake is its third value; x and others settle where their first is below .5."""
    cheap, dear = Fake(1.0, limit=0.5), Fake(2.0, limit=0.0)
    field = planned(plan_of((), ("cheap else dear",), (0.0,)), {"dear": dear, "cheap": cheap})

    def values(*rows: tuple[float, float]) -> Tensor:
        return torch.tensor([(first, 0.0, mass) for first, mass in rows])

    x = values((0.1, 0.0), (0.6, -21.0), (0.1, 0.0), (0.6, 0.0), (0.6, -30.0))
    others = values((0.6, -21.0), (0.1, 0.0), (0.7, -19.0), (0.7, -40.0), (0.1, 0.0))
    found = field.pairs(x, others, torch.zeros(5), slice(0, 9))
    assert found.weighted.mean[:, 0].tolist() == [1, 1, 1, 2, 1, 1, 1, 2, 2, 1]
    assert len(cheap.asked) == len(dear.asked) == 1
    alone = field.part(torch.cat([x, others]), torch.zeros(10), slice(0, 9))
    assert alone.weighted.mean[:, 0].tolist() == [1, 2, 1, 2, 2, 2, 1, 2, 2, 1]


def test_settled_is_one_per_cent_of_two_images() -> None:
    shares = torch.tensor([[0.992, 0.008], [0.988, 0.012]]).double()
    part = Part.summed(
        WeightedMean(torch.zeros(2).double(), shares.square().sum(1).log(), torch.zeros(2, 3)), "x", ids=9
    )
    assert settled(part, torch.zeros(2, 3), torch.zeros(2), torch.eye(3)).tolist() == [True, False]


@pytest.mark.parametrize("rank", [3, 16, 64])
def test_settled_leaves_noise(rank: int) -> None:
    """On the paths to the images found one query of a thousand is asked again, beside them almost all."""
    generator = torch.Generator().manual_seed(rank)
    count, dim = 20_000, 80
    directions = torch.linalg.qr(torch.randn(dim, rank, generator=generator).double()).Q.T.float()
    found, x0 = torch.randn(2, count, dim, generator=generator).unbind()
    t = torch.rand(count, generator=generator) * 0.99
    one = WeightedMean(torch.zeros(count).double(), torch.zeros(count).double(), found)
    part = Part.summed(one, "x", ids=9)
    x = t[:, None] * found + (1 - t[:, None]) * x0
    again = (~settled(part, x, t, directions)).double().mean()
    assert 0.0005 < again < 0.002
    beside = 8 * directions.sum(0)  # by |8| in each of the directions, whatever else
    late = t > 0.5
    assert not settled(part, x + t[:, None] * beside, t, directions)[late].any()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    store = store_of(smooth(400), tmp_path_factory.mktemp("planned"))
    return NeighbourIndex.build(store, store.folder, rank=40)


def way(index: NeighbourIndex, name: str) -> Calibrated:
    rows = PixelRows(index.store.pixels)
    ways = {one: support_of(one, index, rows, BUDGET) for one in ways_of(name)}
    plan = plan_of((), (name,), (torch.nan,))
    return Calibrated(rows, plan, ways, looked_at(index, rows.device), budget=BUDGET)


def test_each_answer_is_that_of_the_way_it_names(index: NeighbourIndex) -> None:
    field = EmpiricalVelocity(way(index, "32/8 alone else 64/30"), index.store)
    x, t = queries(index.store, 0.72, count=60)
    found = field.estimate(x, t)
    assert set(found.ladder) == {"32/8 alone", "64/30"}
    for name in set(found.ladder):
        mine = [row for row, other in enumerate(found.ladder) if other == name]
        alone = EmpiricalVelocity(way(index, name), index.store).estimate(x[mine], t[mine])
        torch.testing.assert_close(found.velocity[mine], alone.velocity, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.candidates[mine], alone.candidates)
    first = EmpiricalVelocity(way(index, "32/8 alone"), index.store).estimate(x, t)
    assert [name == "32/8 alone" for name in found.ladder] == (first.ess <= 1.02).tolist()


@pytest.mark.parametrize("time", [0.3, 0.8, 0.95])
def test_with_mirror_images_only_one_half_is_asked_again(index: NeighbourIndex, time: float) -> None:
    """The field of both orientations, to stored images and to their mirror images."""
    both = EmpiricalVelocity(way(index, "32/8 alone else 64/30"), index.store, flip=True)
    x1, generator = index.store.images(torch.arange(100)), torch.Generator().manual_seed(0)
    x1[::2] = x1[::2].flip(-1)
    t = torch.full((100,), time)
    x = interpolate(torch.randn(x1.shape, generator=generator), x1, t)
    images = all_images(index.store)
    every = torch.cat([images, images.view(-1, *x.shape[1:]).flip(-1).flatten(1)])
    wanted, found = oracle(every, x, t), both.estimate(x, t)
    error = (found.velocity - wanted).flatten(1).norm(dim=1) / wanted.flatten(1).norm(dim=1)
    assert error.quantile(0.99) < 0.01
    assert time < 0.9 or found.ladder.count("64/30") < 10, "half of the queries lie beside all paths"


def test_queries_beside_the_paths_of_stored_images_go_to_the_second_way(index: NeighbourIndex) -> None:
    """However sharply one image stands out: which it is, so few candidates do not tell."""
    field = EmpiricalVelocity(way(index, "32/8 alone else 64/30"), index.store)
    x1, generator = index.store.images(torch.arange(200)), torch.Generator().manual_seed(0)
    x0, t = torch.randn(x1.shape, generator=generator), torch.full((200,), 0.95)
    stored, others = (field.estimate(interpolate(x0, some, t), t) for some in (x1, x1.flip(-1)))
    assert stored.ladder.count("64/30") < 5
    assert set(others.ladder) == {"64/30"}
    first = EmpiricalVelocity(way(index, "32/8 alone"), index.store)
    assert (first.estimate(interpolate(x0, x1.flip(-1), t), t).ess <= 1.02).any(), "unsettled: proves nothing"


@pytest.mark.parametrize("name", ["64/{}", "64/{} alone", "32/90 64/{}", "32/90 64/{} rest of 150"])
def test_ways_of_one_scan_are_called_together(
    index: NeighbourIndex, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query's answer is that of its own way, though all images are weighed once for all."""
    names = [name.format(keep) for keep in (9, 40, 3)]
    rows = PixelRows(index.store.pixels)
    ways = {name: support_of(name, index, rows, BUDGET) for name in names}
    plan = plan_of((0.3, 0.6), tuple(names), (0.1, 0.2, 0.3))
    both = Calibrated(rows, plan, ways, looked_at(index, rows.device), budget=BUDGET)
    drawn = [queries(index.store, time, count=11) for time in (0.05, 0.45, 0.7)]
    x, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    scans: list[int] = []

    def counted(row: Tensor, *rest: object, **settings: object) -> Scores:
        scans.append(len(row))
        return scores_of(row, *rest, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("nnflow.farfield.scores_of", counted)
    found = EmpiricalVelocity(both, index.store).estimate(x[order], t[order])
    assert set(scans) == {33}
    assert [found.ladder[place] for place in order.argsort().tolist()] == [
        n for n in names for _ in range(11)
    ]
    for name in names:
        mine = torch.tensor([row for row, other in enumerate(found.ladder) if other == name])
        field = EmpiricalVelocity(ways[name], index.store)
        alone = field.estimate(x[order[mine]], t[order[mine]])
        torch.testing.assert_close(found.velocity[mine], alone.velocity, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.ess[mine], alone.ess, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.bound[mine], alone.bound)
        assert torch.equal(found.candidates[mine], alone.candidates)
        assert alone.candidates.max() == Ladder.parse(name).levels[-1][1]


def test_a_way_of_the_same_scan_that_follows_another(index: NeighbourIndex) -> None:
    found = way(index, "64/3 alone else 64/40 alone")
    x, t = queries(index.store, 0.72, count=60)
    estimate = EmpiricalVelocity(found, index.store).estimate(x, t)
    assert set(estimate.ladder) == {"64/3 alone", "64/40 alone"}
    dear = EmpiricalVelocity(way(index, "64/40 alone"), index.store).estimate(x, t)
    mine = [row for row, name in enumerate(estimate.ladder) if name == "64/40 alone"]
    torch.testing.assert_close(estimate.velocity[mine], dear.velocity[mine], rtol=1e-5, atol=1e-5)


def test_calibration_says_of_two_ways_what_asking_them_gives(
    index: NeighbourIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table never asks two ways in turn: it puts the answers of each together."""
    monkeypatch.setattr(calibrating, "_TIMES", (0.7, 0.75))
    monkeypatch.setattr(calibrating, "_COLLAPSE", ())
    monkeypatch.setattr(calibrating, "_LAST", 0.8)
    monkeypatch.setattr(measuring.Bench, "answer", priced)
    table = calibrating.calibrate(index, queries=64, seed=3)
    bench = measuring.Bench(index, None, BUDGET, 3)
    both = [entry for entry in table.entries if " else " in entry.ladder]
    assert len({entry.ladder for entry in both}) > 3
    seconds = {(entry.t, entry.ladder): entry.seconds for entry in table.entries}
    for entry in both[::5]:
        x, t = bench.queries(entry.t, 64, held_in=True)
        mean = way(index, entry.ladder).part(x, t, slice(0, len(index))).weighted.mean
        wanted = oracle(all_images(index.store), x.view(-1, *index.store.shape[1:]), t).flatten(1)
        error = ((mean - x) / (1 - entry.t) - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert entry.held_in.p50 == pytest.approx(error.quantile(0.5).item(), rel=0.02, abs=1e-5)
        assert entry.held_in.upper == pytest.approx(error.max().item(), rel=0.02, abs=1e-5)
        first, then = ways_of(entry.ladder)
        assert seconds[entry.t, first] < entry.seconds < seconds[entry.t, then]
    assert Calibration.open(index) == table
