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

import numpy as np
import pytest
import torch
from contract import pixels_of
from PIL import Image

from nnflow.cli import main
from nnflow.store import ImageStore, to_uint8
from nnflow.unet import LearnedVelocity

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
    """A folder with images/, an index of them, and a run of three steps: made once, only read."""
    home = tmp_path_factory.mktemp("built")
    write_images(home / "images")
    write_images(home / "others", seed=9)
    for source, out in (("images", "index"), ("others", "other")):
        with pytest.raises(SystemExit) as exit_:
            main(["index", str(home / source), str(home / out), "--size", "4", "--rank", "5"])
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
    code, _, _ = run("index", tmp_path / "broken", tmp_path / "out-broken", "--size", 4, "--skip-unreadable")
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
    for arguments, said in [
        (["train", built / "index", *again], "--resume"),
        (["train", built / "index", *again, "--resume", "--learning-rate", "0.1"], "learning_rate"),
        (["train", built / "other", *again, "--resume"], "images"),
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
