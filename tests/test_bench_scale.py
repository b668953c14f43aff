"""scripts/bench_scale.py: what is counted is counted, and what was not measured is said to be so."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from stores import store_of
from torch import Tensor

from nnflow import NeighbourIndex
from nnflow.calibrating import calibrate
from nnflow.planning import Plan, Stretch
from nnflow.settling import settling_times, write_settling
from nnflow.velocity import EmpiricalVelocity

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
script = importlib.import_module("bench_scale")
tables = importlib.import_module("scale_table")
N, SIDE = 300, 6
D = 3 * SIDE * SIDE


def index_of(count: int, folder: Path) -> NeighbourIndex:
    generator = torch.Generator().manual_seed(count)
    base = torch.randint(0, 256, (count, 3, 1, 1), generator=generator).float()
    pixels = base + 20 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    store = store_of(pixels.clamp(0, 255).byte(), folder)
    index = NeighbourIndex.build(store, store.folder, rank=8)
    times = settling_times(index)
    assert times is not None
    write_settling(store, times)
    calibrate(index, queries=16)
    return index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> NeighbourIndex:
    return index_of(N, tmp_path_factory.mktemp("scale"))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_scale", *map(str, arguments)])
    return script.main()


SMALL = ("--batches", "2", "--samples", "3", "--steps", "8")


def test_one_index_start_to_finish(
    index: NeighbourIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, index.folder, *SMALL, "--json", tmp_path / "a.json") == 0
    figures = json.loads((tmp_path / "a.json").read_text())
    assert (figures["n"], figures["d"]) == (N, D)
    assert set(figures["seconds"]) == {"velocity", "efm", "efm-unbiased"}
    assert figures["errors"]["queries"] == 2 * script.BATCH
    assert figures["errors"]["p99"] <= figures["errors"]["worst"] < 0.05
    drawn = figures["samples"]
    assert drawn["landed"] == drawn["samples"] == 3
    assert drawn["exact_calls"] == drawn["calls"] <= 10
    assert drawn["same_image"] == 3
    assert figures["stream"]["passes"] == 2
    lines = capsys.readouterr().out.splitlines()
    assert all(line.count("|") == 3 for line in lines)
    assert len(lines) > 20


def test_the_first_batch_is_not_counted_and_ratios_are_of_neighbours(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By clocks that run as told: near 1, 2, 4 s and exact 1, 6, 20 s."""
    near, exact = (EmpiricalVelocity.exact(index.store, device="cpu") for _ in range(2))
    taken = iter([1.0, 1.0, 2.0, 6.0, 4.0, 20.0])
    monkeypatch.setattr(script, "read_settling", lambda store: None)
    monkeypatch.setattr(script, "timed", lambda call: (next(taken), call()))
    monkeypatch.setattr(sys, "argv", ["bench_scale", str(index.folder), "--batches", "2"])
    found = script.compare(index, near, exact, script.parsed())
    costs = found["seconds"]["velocity"]
    assert (costs["near_and_far"].low, costs["near_and_far"].high) == (2, 4)
    assert (costs["ratio"].low, costs["ratio"].high) == (3, 5)
    assert found["errors"]["worst"] == 0


def test_samples_that_would_take_too_long_are_measured_in_part_and_said_to_be(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = EmpiricalVelocity.estimate

    def slow(self: EmpiricalVelocity, x: Tensor, *rest: Tensor) -> object:
        if self is exact:
            time.sleep(0.1)
        return whole(self, x, *rest)

    near, exact = (EmpiricalVelocity.exact(index.store, device="cpu") for _ in range(2))
    monkeypatch.setattr(EmpiricalVelocity, "estimate", slow)
    monkeypatch.setattr(sys, "argv", ["bench_scale", str(index.folder), *SMALL, "--patience", "0.25"])
    drawn = script.memorised(index, near, exact, script.parsed())
    assert 1 <= drawn["exact_calls"] <= 3 < drawn["calls"]
    assert 0.1 <= drawn["exact_measured"] / drawn["exact_calls"] < 0.4  # one call, on a busy machine too
    assert drawn["same_image"] is None
    assert f"{drawn['exact_calls']} of {drawn['calls']} calls measured" in tables.whole_time(drawn)
    by_hand = {"exact_measured": 4.0, "exact_calls": 5, "calls": 20}
    assert tables.whole_time(by_hand) == "16 = 5 of 20 calls measured in 4 s, x 20/5"
    assert tables.whole_time(by_hand | {"calls": 5}) == "4.00"


def test_every_pass_over_the_pixels_is_counted(
    index: NeighbourIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget whose half holds the logits of 40 queries of 128: four chunks, two passes."""
    budget = 2 * 40 * (4 * N + 24 * D)
    monkeypatch.setattr(sys, "argv", ["bench_scale", str(index.folder), "--memory", str(budget)])
    found = script.streaming(index, script.parsed())
    assert found["passes"] == 8
    assert found["bytes_per_second"] == pytest.approx(8 * N * D / found["seconds"])
    assert found["flop_per_second"] == pytest.approx(4 * 128 * N * D / found["seconds"])


def test_growth(
    index: NeighbourIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = index_of(40, tmp_path)
    assert run(monkeypatch, "--growth", index.folder, other.folder, "--batches", "1") == 0
    out = capsys.readouterr().out
    assert "| 300 |" in out
    assert "| 40 |" in out
    spreads = [tables.Spread(3.0 * n**0.7, 0.0, 1e9) for n in (100, 1_000, 50_000)]
    assert script.exponent([100, 1_000, 50_000], spreads) == pytest.approx(0.7)
    assert run(monkeypatch, "--growth", index.folder, index.folder) == 2
    assert "wanted different numbers" in capsys.readouterr().err


def test_stages_are_read_off_their_last_bar() -> None:
    told = (
        "\rindexing:   0%|    | 0/9 [00:00<?, ?block/s]\rindexing: 100%|####| 9/9 [01:05<00:00, 2block/s]\n"
        "covariance: 100%|####| 3/3 [1:00:02<00:00,  1.0s/block]\n"
        "probing:  50%|##   | 1/2 [00:09<00:09, 1block/s]\n"
    )
    assert importlib.import_module("scale_build").stages(told) == {"indexing": 65.0, "covariance": 3602.0}


def test_a_plan_in_short() -> None:
    names = ("64/30", "64/30", "exact", "64/30")
    plan = Plan((0.1, 0.2, 0.3), tuple(Stretch(0.1, name, 1.0, 0.0) for name in names), (0.0,) * 4)
    assert script.in_short(plan) == "64/30 from 0, exact from 0.2, 64/30 from 0.3"


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["--growth", "a"], ["--build", "a", "b"], ["a", "--batches", "0"]]
)
def test_arguments_that_do_not_fit_together(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, *arguments)
    told = capsys.readouterr().err.splitlines()[-1]
    assert "wanted" in told or "leave out" in told


def test_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path / "none") == 2
    assert "no such folder" in capsys.readouterr().err
