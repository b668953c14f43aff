"""The command line as a user meets it: the whole way on a small set, and every bad input in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import pixels_of
from PIL import Image

from nnflow.calibration import Calibration, Entry, Quantiles
from nnflow.cli import main
from nnflow.cli.calibrate import exact_share, table
from nnflow.index import NeighbourIndex
from nnflow.settling import read_settling
from nnflow.store import ImageStore, to_uint8
from nnflow.unet import LearnedVelocity
from nnflow.velocity import EmpiricalVelocity

TINY = ["--channels", "8", "--blocks", "1", "--head-dim", "8", "--batch", "4", "--warmup", "0"]
SHORT = ["--steps", "3", "--checkpoint-every", "2", "--sample-every", "3", *TINY]


def write_images(
    folder: Path, *, count: int = 24, seed: int = 0, classes: tuple[str, ...] = ("a", "b")
) -> Path:
    for number, image in enumerate(pixels_of(count, seed)):
        path = folder / classes[number % len(classes)] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/, an index of them, and a run of three steps: made once, only read.

    The index is calibrated, that of others/ is not.
    """
    home = tmp_path_factory.mktemp("built")
    write_images(home / "images")
    write_images(home / "others", seed=9)
    for source, out, seconds in (("images", "index", "0.5"), ("others", "other", "0")):
        with pytest.raises(SystemExit) as exit_:
            main(["index", str(home / source), str(home / out), "--size", "4", "--rank", "5",
                  "--calibration-seconds", seconds])  # fmt: skip
        assert not exit_.value.code
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(home / "index"), "--out", str(home / "run"), *SHORT])
    assert not exit_.value.code
    return home


def one_line(err: str) -> str:
    """The last line of stderr, which is the only one that is no progress bar."""
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("nnflow:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


def test_the_whole_way(built: Path, run: Run, tmp_path: Path) -> None:
    index, trained = built / "index", built / "run"
    code, out, _ = run("info", index, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["count"], facts["shape"], facts["classes"]) == (24, [3, 4, 4], {"a": 12, "b": 12})

    arguments = ["--index", index, "--run", trained, "--seeds", "0-2,7", "--steps", "8"]
    code, out, _ = run(
        "sample",
        *arguments,
        "--field",
        "empirical,hybrid,learned",
        "--tau",
        "0.2,0.5",
        "--out",
        tmp_path / "s",
    )
    assert code == 0
    names = ["empirical", "hybrid-0.2", "hybrid-0.5", "learned"]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == sorted(
        [f"samples-{name}.npy" for name in names]
        + [f"grid-{name}.png" for name in names]
        + ["nearest.json", "config.json", "comparison.png"]
    )
    assert set(out.split()) == {str(path) for path in (tmp_path / "s").iterdir()}
    store = ImageStore.open(index)
    memorised = torch.from_numpy(np.load(tmp_path / "s" / "samples-empirical.npy", allow_pickle=False))
    nearest = json.loads((tmp_path / "s" / "nearest.json").read_text())
    for image, entry, seed in zip(memorised, nearest["empirical"], [0, 1, 2, 7], strict=True):
        assert entry["seed"] == seed
        assert entry["distance"] < 1e-4
        assert torch.equal(to_uint8(image).flatten(), store.pixels[entry["nearest"]])
        assert store.paths[entry["nearest"]] == entry["path"]
        assert entry["path"].startswith(entry["class"] + "/")

    code, out, _ = run(
        "evaluate", "--index", index, "--run", trained, "--samples", tmp_path / "s" / "samples-empirical.npy",
        "--held-out", built / "other", "--pairs", "8", "--out", tmp_path / "e",
    )  # fmt: skip
    assert code == 0
    assert "samples: 4 of 4 memorised, 100.0 %" in out
    report = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert report["samples"]["memorised"]["fraction"] == 1
    assert report["sample_seeds"] == [0, 1, 2, 7]
    assert report["held_out"]["memorised"]["images"] == 24
    assert report["config"]["estimator"] == "exact"  # the reference, though the index is calibrated
    assert len(report["error"]["mean_squared"]) == len(report["error"]["times"])
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "distances.png", "error.png", "evaluation.json",
    ]  # fmt: skip


def test_a_class_and_the_nearest_estimator(built: Path, run: Run, tmp_path: Path) -> None:
    code, _, _ = run(
        "sample", "--index", built / "index", "--estimator", "nearest", "--k", "5", "--class", "b",
        "--seeds", "0-4", "--steps", "10", "--out", tmp_path,
    )  # fmt: skip
    assert code == 0
    entries = json.loads((tmp_path / "nearest.json").read_text())["empirical"]
    assert {entry["class"] for entry in entries} == {"b"}
    assert max(entry["distance"] for entry in entries) < 1e-4


def test_mirrored_copies_are_copies_of_what_was_mirrored(built: Path, run: Run, tmp_path: Path) -> None:
    """Half of the samples of a mirrored u* are mirror images: all 16 are memorised, and shown so."""
    drawn, judged = tmp_path / "samples", tmp_path / "judged"
    run(
        "sample",
        "--index",
        built / "index",
        "--estimator",
        "exact",
        "--flip",
        "--seeds",
        "0-15",
        "--out",
        drawn,
    )
    entries = json.loads((drawn / "nearest.json").read_text())["empirical"]
    assert max(entry["distance"] for entry in entries) < 1e-4
    assert 2 < sum(entry["mirrored"] for entry in entries) < 14
    code, out, _ = run("evaluate", "--index", built / "index", "--samples", drawn, "--out", judged)
    assert code == 0
    assert "16 of 16 memorised" in out
    assert "mirror images counted" in out
    config = json.loads((drawn / "config.json").read_text())
    (drawn / "config.json").write_text(json.dumps(config | {"flip": False, "mirrored": False}))
    _, out, _ = run("evaluate", "--index", built / "index", "--samples", drawn, "--out", tmp_path / "plain")
    assert "16 of 16" not in out
    assert "mirror images counted" not in out


def test_samples_drawn_beside_other_images_are_told(built: Path, run: Run, tmp_path: Path) -> None:
    drawn = tmp_path / "samples"
    run("sample", "--index", built / "index", "--estimator", "exact", "--seeds", "0-3", "--out", drawn)
    for name, told in (("index", False), ("other", True)):
        _, _, err = run("evaluate", "--index", built / name, "--samples", drawn, "--out", tmp_path / name)
        assert ("drawn beside other images" in err) == told


def test_copies_of_images_stored_twice_are_told(run: Run, tmp_path: Path) -> None:
    write_images(tmp_path / "images", count=4)
    write_images(tmp_path / "images" / "again", count=4)
    run("index", tmp_path / "images", tmp_path / "out", "--size", 4, "--calibration-seconds", 0)
    run(
        "sample",
        "--index",
        tmp_path / "out",
        "--estimator",
        "exact",
        "--seeds",
        "0-7",
        "--out",
        tmp_path / "s",
    )
    _, out, _ = run(
        "evaluate", "--index", tmp_path / "out", "--samples", tmp_path / "s", "--out", tmp_path / "e"
    )
    copies = json.loads((tmp_path / "e" / "evaluation.json").read_text())["samples"]["copies"]
    memorised = json.loads((tmp_path / "e" / "evaluation.json").read_text())["samples"]["memorised"][
        "memorised"
    ]
    assert copies == 8
    assert (f"; {copies} equal in every byte" in out) == (memorised < copies)


def test_a_folder_that_is_no_index_is_told_from_one_that_is_not_done(run: Run, tmp_path: Path) -> None:
    images = write_images(tmp_path / "my photos")
    code, _, err = run("info", images)
    assert code == 2
    assert "no index in this folder; name what nnflow index wrote" in one_line(err)
    code, _, err = run("info", tmp_path / "no such place")
    assert f"no such folder; run: nnflow index SOURCE '{tmp_path}/no such place'" in one_line(err)


def test_help_shows_its_examples_line_by_line(run: Run) -> None:
    _, out, _ = run("--help")
    examples = [line for line in out.splitlines() if line.startswith("  nnflow ")]
    assert len(examples) == 5
    assert "\\b" not in out


def test_samples_of_a_run_are_those_of_its_weights(built: Path, run: Run, tmp_path: Path) -> None:
    run("sample", "--index", built / "index", "--run", built / "run", "--field", "learned",
        "--seeds", "3", "--steps", "1", "--out", tmp_path)  # fmt: skip
    network = LearnedVelocity.open(built / "run", device="cpu")
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    wanted = noise + network(noise, 0.0)
    found = torch.from_numpy(np.load(tmp_path / "samples-learned.npy", allow_pickle=False))
    torch.testing.assert_close(found, wanted.detach())


def test_grids_were_drawn_on_the_way(built: Path) -> None:
    assert [path.name for path in (built / "run" / "samples").iterdir()] == ["step-00000003.png"]


def test_dry_run_prints_what_a_run_saves(built: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("train", built / "index", "--out", tmp_path / "run", "--dry-run", *SHORT)
    assert code == 0
    assert not (tmp_path / "run").exists()
    assert json.loads(out) == json.loads((built / "run" / "config.json").read_text())["config"]


def test_a_finished_index_is_reused(built: Path, run: Run) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (built / "index").iterdir()}
    code, out, _ = run("index", built / "images", built / "index", "--size", 4, "--rank", 5)
    assert code == 0
    assert "24 of 4 x 4" in out
    after = {p.name: p.stat().st_mtime_ns for p in (built / "index").iterdir()}
    assert before == after


# ---------------------------------------------------------------------- calibration


def calibrated(*rows: tuple[float, str, float, float]) -> Calibration:
    """Entries (t, ladder, milliseconds, p99): the percentiles below it are a half and a quarter of it."""
    return Calibration(
        tuple(
            Entry(t, ladder, ms / 1000, Quantiles(p99 / 4, p99 / 2, p99, p99, 90), None)
            for t, ladder, ms, p99 in rows
        ),
        "an index",
        {"64/9": 0.064, "128/9 alone": 0.128, "exact": 0.256},
        {},
    )


MADE_UP = calibrated(
    (0.1, "exact", 10.0, 0.0), (0.1, "64/9", 1.0, 0.004),
    (0.2, "exact", 10.0, 0.0), (0.2, "64/9", 2.0, 0.008), (0.2, "128/9 alone", 5.0, 0.001),
    (0.5, "exact", 8.0, 0.0), (0.5, "64/9", 2.0, 0.02), (0.5, "128/9 alone", 5.0, 0.001),
)  # fmt: skip


def test_the_table_of_a_calibration_by_hand() -> None:
    """64/9 meets 1 % at .1 and .2, 128/9 alone at .2 and .5."""
    lines = table(MADE_UP, 0.01).splitlines()
    assert [line.split() for line in lines[2:-1]] == [
        ["0.1", "64/9", "0.1", "0.2", "0.4", "-", "1.5", "12", "8"],
        ["0.2", "128/9", "alone", "0.025", "0.05", "0.1", "-", "6", "12", "2"],
        ["0.5", "128/9", "alone", "0.025", "0.05", "0.1", "-", "6", "10", "1.67"],
    ]
    # .1 x 1 + .1 x 1.5 + .3 x 5 + .5 x 5 of .1 x 10 + .1 x 10 + .3 x 9 + .5 x 8; calls .5 + 1 of 2
    assert "5.75 ms per query, exact 10.7 ms, ratio 1.86; exact field for 0 % of t" in lines[-1]


def test_where_no_ladder_will_do_the_table_says_so() -> None:
    plan = MADE_UP.plan(0.0009)
    assert exact_share(plan) == 1
    assert [stretch.width for stretch in plan.stretches] == pytest.approx([0.1, 0.1, 0.3, 0.5])
    assert exact_share(MADE_UP.plan(0.005)) == pytest.approx(0.1)  # 64/9 until .1 were a call more
    rows = table(MADE_UP, 0.005).splitlines()
    assert rows[2].split() == ["0.1", "exact", "0", "0", "0", "-", "12", "12", "1"]
    assert rows[-1].endswith("exact field for 10 % of t")


def test_calibrate_writes_what_it_names(built: Path, run: Run, tmp_path: Path) -> None:
    index = tmp_path / "index"
    shutil.copytree(built / "other", index)
    assert not (index / "calibration.json").exists()
    assert f"calibrated     no: {index}" in run("info", index)[1]
    assert json.loads(run("info", index, "--json")[1])["calibration"] is None
    before = set(index.iterdir())
    code, out, _ = run("calibrate", index, "--held-out", built / "index", "--queries", 4, "--seed", 3,
                       "--seconds", 0.5)  # fmt: skip
    assert code == 0
    written = {Path(line) for line in out.splitlines() if line.startswith(str(index))}
    assert written == set(index.iterdir()) - before
    assert {path.name for path in written} == {"calibration.json", "calibration.png", "settling.npz"}
    found = Calibration.open(NeighbourIndex.open(index))
    assert (found.about["seed"], found.about["queries"]) == (3, 4)
    assert found.about["held_out"] == ImageStore.open(built / "index").fingerprint
    assert table(found, 0.01) in out
    assert read_settling(ImageStore.open(index)) is not None
    known = json.loads(run("info", index, "--json")[1])["calibration"]
    assert known == {"queries": 4, "times": len(found.times), "tolerance": 0.01, "exact_share": 1.0}
    told = f"calibrated     4 queries at {len(found.times)} times; tolerance 0.01: exact field for 100 % of t"
    assert told in run("info", index)[1]


def test_the_tolerance_is_that_of_the_settling_times_too(built: Path, run: Run, tmp_path: Path) -> None:
    found = []
    for tolerance in (0.01, 0.2):
        index = tmp_path / str(tolerance)
        shutil.copytree(built / "other", index)
        run("calibrate", index, "--queries", 2, "--seconds", 0.5, "--tolerance", tolerance)
        found.append(read_settling(ImageStore.open(index)))
    assert (found[1] < found[0]).all()


def test_an_index_is_calibrated_unless_it_is(built: Path, run: Run, tmp_path: Path) -> None:
    """`test_a_finished_index_is_reused` has the rest: a valid table is left alone."""
    assert (built / "index" / "calibration.json").exists()
    index = tmp_path / "index"
    shutil.copytree(built / "index", index)
    again = ["index", built / "images", index, "--size", 4, "--rank", 5, "--calibration-seconds"]
    (index / "calibration.json").write_text("{}")
    assert run(*again, 0)[0] == 0
    assert (index / "calibration.json").read_text() == "{}"
    assert run(*again, 0.5)[0] == 0
    assert Calibration.open(NeighbourIndex.open(index)).times


def test_held_out_images_of_another_shape_are_refused(built: Path, run: Run, tmp_path: Path) -> None:
    run("index", built / "others", tmp_path / "large", "--size", 8, "--calibration-seconds", 0)
    index = tmp_path / "index"
    shutil.copytree(built / "other", index)
    code, _, err = run("calibrate", index, "--held-out", tmp_path / "large", "--seconds", 0.5)
    assert code == 2
    assert "held-out images of shape" in one_line(err)
    assert not (index / "calibration.json").exists()


@pytest.mark.parametrize(
    ("index", "arguments", "recorded"),
    [
        ("index", [], ("near-and-far", None, 0.01)),
        ("index", ["--tolerance", "0.2"], ("near-and-far", None, 0.2)),
        ("index", ["--estimator", "exact"], ("exact", None, None)),
        ("index", ["--estimator", "nearest", "--k", "5"], ("nearest", 5, None)),
        ("other", [], ("exact", None, None)),
    ],
)
def test_the_estimator_is_recorded(
    built: Path, run: Run, tmp_path: Path, index: str, arguments: list[str], recorded: tuple[object, ...]
) -> None:
    code, _, err = run("sample", "--index", built / index, *arguments, "--seeds", 1, "--steps", 2,
                       "--out", tmp_path)  # fmt: skip
    assert code == 0
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["estimator"], config["k"], config["tolerance"]) == recorded
    fallen = [line for line in err.splitlines() if "has not been calibrated; run: nnflow calibrate" in line]
    assert len(fallen) == (index == "other")


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_near_and_far_by_the_tolerance_given(
    built: Path, run: Run, tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float | None] = []
    usual = EmpiricalVelocity.near_and_far

    def spy(index: NeighbourIndex, **rest: Any) -> EmpiricalVelocity:
        asked.append(rest["tolerance"])
        return usual(index, **rest)

    monkeypatch.setattr(EmpiricalVelocity, "near_and_far", spy)
    arguments = ["--index", built / "index", "--estimator", "near-and-far", "--tolerance", 0.3]
    if command == "sample":
        arguments += ["--seeds", 1, "--steps", 2]
    else:
        arguments += ["--run", built / "run", "--pairs", 4]
    assert run(command, *arguments, "--out", tmp_path)[0] == 0
    assert asked == [0.3]
    if command == "evaluate":
        config = json.loads((tmp_path / "evaluation.json").read_text())["config"]
        assert (config["estimator"], config["k"], config["tolerance"]) == ("near-and-far", None, 0.3)


def test_near_and_far_asked_for_is_not_replaced(built: Path, run: Run, tmp_path: Path) -> None:
    other = built / "other"
    for command in (
        ["sample", "--index", other, "--estimator", "near-and-far", "--out", tmp_path / "x"],
        ["train", other, *SHORT, "--field", "near-and-far", "--out", tmp_path / "x"],
    ):
        code, _, err = run(*command)
        assert code == 2
        assert f"run: nnflow calibrate {other}" in one_line(err)
        assert not (tmp_path / "x").exists()


def test_help_names_every_knob_of_training(run: Run) -> None:
    import dataclasses

    from nnflow.config import TrainConfig

    code, out, _ = run("train", "--help")
    assert code == 0
    for knob in dataclasses.fields(TrainConfig):
        assert f"--{knob.name.replace('_', '-')}" in out


# ---------------------------------------------------------------------- bad input, one line each


def test_bad_sources(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    (tmp_path / "broken").mkdir()
    shutil.copytree(write_images(tmp_path / "fine"), tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / "a" / "004.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../../evil.png", b"x")
    for source, said in [
        ("empty", "empty"),
        ("text", "no image"),
        ("missing", "no such"),
        ("broken", "004.png"),
        ("evil.zip", "evil.png"),
    ]:
        code, _, err = run("index", tmp_path / source, tmp_path / f"out-{source}", "--size", 4)
        assert code == 2
        assert said in one_line(err)
        assert not (tmp_path / f"out-{source}" / "manifest.json").exists()
    code, _, _ = run("index", tmp_path / "broken", tmp_path / "out-broken", "--size", 4, "--skip-unreadable",
                     "--calibration-seconds", 0)  # fmt: skip
    assert code == 0
    assert "a/004.png" in (tmp_path / "out-broken" / "skipped.csv").read_text()
    assert len(ImageStore.open(tmp_path / "out-broken")) == 23


def test_out_of_other_data_is_refused_and_kept(built: Path, run: Run) -> None:
    for arguments, said in [
        ((built / "others", built / "index", "--size", 4), "source"),
        ((built / "images", built / "index", "--size", 8), "size"),
        ((built / "images", built / "index", "--size", 4, "--grey"), "grey"),
    ]:
        code, _, err = run("index", *arguments, "--rank", 5)
        assert code == 2
        assert said in one_line(err).lower()
    assert run("info", built / "index")[0] == 0


@pytest.mark.parametrize("part", ["images.h5", "embedding.safetensors", "index.faiss", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "foreign", "missing"])
def test_damaged_parts_are_named(built: Path, run: Run, tmp_path: Path, part: str, damage: str) -> None:
    out = tmp_path / "index"
    shutil.copytree(built / "index", out)
    if damage == "cut":
        (out / part).write_bytes((out / part).read_bytes()[:-100])
    elif damage == "foreign":
        shutil.copy(built / "other" / part, out / part)
    else:
        (out / part).unlink()
    code, _, err = run("info", out)
    assert code == 2
    line = one_line(err)
    # the manifest of the other index is whole, and blames the files that are not its own
    assert part in line or part == "manifest.json"


def test_damaged_checkpoints_are_named(built: Path, run: Run, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    shutil.copytree(built / "run", trained, symlinks=True)
    weights = trained / "latest" / "ema" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    code, _, err = run(
        "sample", "--index", built / "index", "--run", trained, "--field", "learned", "--out", tmp_path / "s"
    )
    assert code == 2
    assert "diffusion_pytorch_model.safetensors" in one_line(err)
    assert not (tmp_path / "s").exists()


def test_runs_are_not_mixed_up(built: Path, run: Run, tmp_path: Path) -> None:
    trained = tmp_path / "run"
    shutil.copytree(built / "run", trained, symlinks=True)
    again = ["--out", trained, *SHORT]
    other = tmp_path / "other"
    shutil.copytree(built / "other", other)
    assert run("calibrate", other, "--queries", 2, "--seconds", 0.1)[0] == 0
    for arguments, said in [
        (["train", built / "index", *again], "--resume"),
        (["train", built / "index", *again, "--resume", "--learning-rate", "0.1"], "learning_rate"),
        (["train", other, *again, "--resume"], "images"),
    ]:
        code, _, err = run(*arguments)
        assert code == 2
        assert said in one_line(err)
    code, out, _ = run("train", built / "index", *again, "--resume", "--steps", "4")
    assert code == 0
    assert "step 4 of 4, loss 0" in out or "step 4 of 4, loss 1" in out
    code, out, _ = run("train", built / "index", *again, "--resume", "--steps", "4")
    assert code == 0
    assert "no step was left to take" in out


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_a_run_on_other_images_is_refused(built: Path, run: Run, tmp_path: Path, command: str) -> None:
    field = ["--field", "learned"] if command == "sample" else []
    code, _, err = run(
        command, "--index", built / "other", "--run", built / "run", *field, "--out", tmp_path / "x"
    )
    assert code == 2
    assert "other images" in one_line(err)
    assert not (tmp_path / "x").exists()


def test_bad_arguments_are_one_line(built: Path, run: Run, tmp_path: Path) -> None:
    index = built / "index"
    for arguments, said in [
        (["index", built / "images", tmp_path / "x", "--size", 4, "--colour"], "--colour"),
        (["index", built / "images", tmp_path / "x", "--size", 4, "--memory", "lots"], "lots"),
        (["index", built / "images", tmp_path / "x", "--size", 4, "--rank", "0"], "rank"),
        (["index", built / "images", tmp_path / "x", "--size", 4, "--kind", "XYZ7"], "XYZ7"),
        (["index", built / "images", tmp_path / "x"], "--size"),
        (["indes"], "indes"),
        (["index", built / "images", tmp_path / "x", "--size", 4, "--calibration-seconds", -1], "-1"),
        (["calibrate", tmp_path / "none"], "none"),
        (["calibrate", index, "--queries", 1], "1"),
        (["calibrate", index, "--tolerance", 0], "tolerance"),
        (["calibrate", index, "--held-out", tmp_path / "none"], "none"),
        (["sample", "--index", index, "--tolerance", "nan", "--out", tmp_path / "x"], "nan"),
        (["sample", "--index", index, "--field", "hybrid", "--out", tmp_path / "x"], "--run"),
        (["sample", "--index", index, "--field", "dream", "--out", tmp_path / "x"], "dream"),
        (["sample", "--index", index, "--seeds", "9-3", "--out", tmp_path / "x"], "9-3"),
        (["sample", "--index", index, "--tau", "1.5", "--out", tmp_path / "x"], "1.5"),
        (["sample", "--index", index, "--class", "wasp", "--out", tmp_path / "x"], "wasp"),
        (["sample", "--index", index, "--device", "warp", "--out", tmp_path / "x"], "warp"),
        (["sample", "--index", tmp_path / "none", "--out", tmp_path / "x"], "none"),
        (["evaluate", "--index", index, "--out", tmp_path / "x"], "--samples"),
        (
            ["evaluate", "--index", index, "--samples", index / "images.h5", "--out", tmp_path / "x"],
            "images.h5",
        ),
        (["train", index, "--out", tmp_path / "x", "--target", "magic"], "magic"),
        (["train", index, "--out", tmp_path / "x", "--steps", "0"], "steps"),
        (["train", index, "--out", tmp_path / "x", "--channels", "12"], "12"),
    ]:
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert said in one_line(err)
        assert not list(tmp_path.glob("x/manifest.json"))


def test_names_cannot_write_to_the_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "\x1b[31mred").mkdir()
    code, out, err = run("index", tmp_path / "\x1b[31mred", tmp_path / "out", "--size", 4)
    assert code == 2
    assert "\x1b" not in out + err


def test_two_builds_at_once(built: Path, run: Run) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c",
         "import sys, time; from pathlib import Path; from nnflow.files import folder_lock\n"
         "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)",
         str(built / "index")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        code, _, err = run("index", built / "images", built / "index", "--size", 4, "--rank", 5)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert code == 2
    assert "another process" in one_line(err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_out(built: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = run("index", built / "images", tmp_path / "locked" / "out", "--size", 4)
    assert code == 2
    assert "may write" in one_line(err)


def test_out_below_a_file(built: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("index", built / "images", tmp_path / "file" / "out", "--size", 4)
    assert code == 2
    assert "file stands where a folder was wanted" in one_line(err)


def test_interrupt_is_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C while 2,000 images are read: one line, exit 130, and the same command finishes."""
    source = tmp_path / "images"
    source.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(source / "0.png")
    for number in range(1, 400):
        os.link(source / "0.png", source / f"{number}.png")
    command = [sys.executable, "-m", "nnflow", "index", str(source), str(tmp_path / "out"), "--size", "4"]
    command += ["--calibration-seconds", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    partial = tmp_path / "out" / "images.h5.partial"
    for _ in range(600):
        if partial.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "continues" in err
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(ImageStore.open(tmp_path / "out")) == 400
