"""What all experiments share: settings, parts that survive a kill, inputs missed in words, the commands."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from contract import pixels_of
from PIL import Image
from refusals import refused
from stores import store_of

from nnflow.cli import cli, main
from nnflow.config import knob, resolve
from nnflow.errors import BusyError, InputError, StoreError
from nnflow.figures import alignment
from nnflow.figures.cosines import EXPERIMENT as COSINES
from nnflow.figures.cosines import CosineSettings
from nnflow.figures.experiment import Document, Settings, images_in_words
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import from_text, to_text
from nnflow.figures.registry import EXPERIMENTS
from nnflow.files import folder_lock
from nnflow.store import ImageStore
from nnflow.training import train

Run = Callable[..., tuple[int, str, str]]
FEW = {"pairs": 300, "times": 4, "point_count": 5}  # three parts of each of the two sets


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


def one_line(err: str) -> str:
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("nnflow:")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of an index at out/, those of another at other/out/, and a run of one step on the latter."""
    home = tmp_path_factory.mktemp("figures")
    store_of(pixels_of(20), home)
    other = store_of(pixels_of(9, seed=4), home / "other")
    tiny = {"target": "efm-m", "samples": 2, "channels": "8", "blocks": 1, "head_dim": 8, "batch": 2}
    train(other, home / "run", resolve("digits", tiny | {"steps": 1, "sample_every": 0}))
    return home


def document_of(path: Path) -> dict[str, Any]:
    """A result without what differs from run to run."""
    found = json.loads(path.read_text())
    del found["provenance"]["seconds"]
    return found


# ---------------------------------------------------------------------- settings


@dataclass(frozen=True, kw_only=True)
class Some(Settings):
    sizes: tuple[int, ...] = knob((8, 16), "sides", low=1)
    taus: tuple[float, ...] = knob((0.5,), "times", low=0, high=1)
    pairs: int = knob(4, "pairs", low=1)


def test_settings_are_read_from_text_and_checked() -> None:
    made = Some.of({"sizes": "4, 8", "taus": "0.1,0.25"})
    assert made == Some(sizes=(4, 8), taus=(0.1, 0.25), pairs=4)
    assert made.to_json() == {"sizes": [4, 8], "taus": [0.1, 0.25], "pairs": 4}
    assert Some.of(made.to_json()) == made
    for values, said in (
        ({"sizes": "8,x"}, "sizes is '8,x': wanted whole numbers"),
        ({"sizes": (0,)}, "sizes is 0: wanted a whole number of at least 1"),
        ({"taus": "0.5,1.5"}, "taus is 1.5: wanted a number from 0 to 1"),
        ({"taus": "now"}, "numbers such as 0.1,0.2"),
        ({"pair": 3}, "unknown setting pair; known are sizes, taus, pairs"),
    ):
        with refused(InputError, said):
            Some.of(values)


def test_a_script_reproduces_each() -> None:
    for name in ("plane", "cosines", "dimension", "trajectories"):
        script = Path(__file__).parent.parent / "scripts" / f"reproduce_{name}"
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True)
        (line,) = [line for line in script.read_text().splitlines() if line.startswith("exec ")]
        words = shlex.split(line.replace("${@:2}", "").replace("${@:3}", ""))
        place = words.index("figures")
        arguments = [word for word in words[place + 2 :] if word]
        assert words[place + 1] == name
        command = cli.commands["figures"]
        assert isinstance(command, click.Group)
        assert command.commands[name].make_context(name, arguments).params["out"]


# ---------------------------------------------------------------------- parts


def counted(value: Any) -> tuple[Callable[[], dict[str, Any]], list[int]]:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"value": value}

    return measure, calls


def test_a_part_is_measured_once_for_each_key(tmp_path: Path) -> None:
    measure, calls = counted((1.5, "a"))
    first = Parts(tmp_path, {"experiment": "x", "version": 1})
    assert first.get("one", {"seed": 0}, measure) == {
        "value": [1.5, "a"]
    }  # as JSON has it, the first time too
    again = Parts(tmp_path, {"experiment": "x", "version": 1})
    assert again.get("one", {"seed": 0}, measure) == {"value": [1.5, "a"]}
    assert (len(calls), first.reused, again.reused) == (1, 0, 1)
    assert again.seconds == first.seconds
    for about, name, key in (
        ({"experiment": "x", "version": 2}, "one", {"seed": 0}),
        ({"experiment": "x", "version": 1}, "two", {"seed": 0}),
        ({"experiment": "x", "version": 1}, "one", {"seed": 1}),
    ):
        Parts(tmp_path, about).get(name, key, measure)
    assert len(calls) == 4
    assert again.get("one", {"seed": 0}, measure)  # the others did not take its place
    assert len(calls) == 4


@pytest.mark.parametrize("damage", ["", "{", '{"key": {}, "seconds": 1, "value": {"value": 7}}', "[]"])
def test_a_damaged_or_foreign_part_is_measured_again(tmp_path: Path, damage: str) -> None:
    measure, calls = counted(3)
    parts = Parts(tmp_path, {"experiment": "x"})
    parts.get("one", {}, measure)
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert parts.get("one", {}, measure) == {"value": 3}
    assert len(calls) == 2


def test_a_part_that_json_cannot_hold_is_our_bug_and_is_not_kept(tmp_path: Path) -> None:
    measure, _ = counted(float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        Parts(tmp_path, {}).get("one", {}, measure)
    assert list(tmp_path.iterdir()) == []


def test_places_differ_as_keys_do(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {"version": 1})
    places = {parts.place("run", {"seed": seed}) for seed in (0, 1)} | {parts.place("other", {"seed": 0})}
    assert len(places) == 3
    assert parts.place("run", {"seed": 0}) in places
    assert not any(place.exists() for place in places)


KILLED = """
import os, signal, sys
from pathlib import Path
from nnflow.figures import alignment
from nnflow.figures.cosines import EXPERIMENT, CosineSettings
from nnflow.figures.inputs import Inputs
inner, calls = alignment.along_paths, []
def counted(*arguments):
    calls.append(1)
    if len(calls) == 5:  # of six, in the second block of the images
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*arguments)
alignment.along_paths = counted
settings = CosineSettings(pairs=300, times=4, point_count=5)
EXPERIMENT.run(settings, Inputs(out=Path(sys.argv[1]), index=Path(sys.argv[2])))
"""


def test_after_a_kill_the_same_command_measures_only_the_rest(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, str(out), str(home / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    kept = {path: path.read_bytes() for path in (out / "parts" / "cosines").glob("*.json")}
    assert len(kept) == 4
    assert not (out / "cosines.json").exists()
    calls = []
    inner = alignment.along_paths
    monkeypatch.setattr(alignment, "along_paths", lambda *a: calls.append(1) or inner(*a))
    settings = CosineSettings(**FEW)
    resumed = COSINES.run(settings, Inputs(out=out, index=home / "out"))
    assert len(calls) == 2
    assert {path: path.read_bytes() for path in kept} == kept
    COSINES.run(settings, Inputs(out=tmp_path / "whole", index=home / "out"))
    assert document_of(out / "cosines.json") == document_of(tmp_path / "whole" / "cosines.json")
    # other pairs are others; a longer time grid too; the set in the plane is not of these images
    calls.clear()
    COSINES.run(CosineSettings(**FEW | {"seed": 1}), Inputs(out=out, index=home / "out"))
    assert len(calls) == 6
    calls.clear()
    other = COSINES.run(settings, Inputs(out=out, index=home / "other" / "out"))
    assert len(calls) == 3
    assert other.results["images"] != resumed.results["images"]


def test_two_commands_do_not_measure_the_same_at_once(home: Path, tmp_path: Path) -> None:
    with folder_lock(tmp_path / "parts" / "cosines"), refused(BusyError, "another process"):
        COSINES.run(CosineSettings(**FEW), Inputs(out=tmp_path, index=home / "out"))


# ---------------------------------------------------------------------- pictures, documents


@pytest.mark.parametrize("channels", [1, 3])
def test_images_in_json_are_those_put_in(channels: int) -> None:
    images = torch.rand(5, channels, 4, 6) * 4 - 2
    texts = to_text(images)
    assert all(text.isascii() for text in texts)
    back = from_text(json.loads(json.dumps(texts)))
    assert back.shape == images.shape
    assert (back - images.clamp(-1, 1)).abs().max() <= 0.5001 / 127.5
    with refused(StoreError, "damaged"):
        from_text(["iVBORw0KGgo="])


def test_a_document_is_read_back(tmp_path: Path) -> None:
    made = Document(name="x", settings={"a": 1}, results={"b": [2]}, missing=("c",), provenance={})
    assert Document.open(made.save(tmp_path)) == made
    (tmp_path / "x.json").write_text('{"format": "nnflow-figure-0"}')
    with refused(StoreError, "nnflow-figure-1"):
        Document.open(tmp_path / "x.json")
    assert (
        images_in_words((1000, 3, 4, 5))
        == "n = 1,000, d = 60 (3 \N{MULTIPLICATION SIGN} 4 \N{MULTIPLICATION SIGN} 5)"
    )
    assert images_in_words((7, 1, 1, 2)) == "n = 7, d = 2"


# ---------------------------------------------------------------------- the command line


def test_every_figure_has_its_command_and_every_setting_its_option(run: Run) -> None:
    code, out, _ = run("figures", "--help")
    assert code == 0
    for name, experiment in EXPERIMENTS.items():
        assert f"\n  {name} " in out
        code, page, _ = run("figures", name, "--help")
        assert code == 0
        for option in (*(f.name for f in fields(experiment.settings)), *experiment.inputs, "out", "redraw"):
            assert f"--{option.replace('_', '-')} " in page, option
        assert ("--tolerance" in page) == experiment.tolerant
        assert experiment.command("DIR").startswith(f"nnflow figures {name} ")


def test_cosines_from_the_command_line_and_drawn_again(home: Path, run: Run, tmp_path: Path) -> None:
    arguments = [
        "--index",
        home / "out",
        "--pairs",
        "6",
        "--times",
        "4",
        "--point-count",
        "7",
        "--out",
        tmp_path,
    ]
    code, out, _ = run("figures", "cosines", *arguments)
    assert code == 0
    names = ["cosines.json", "cosines.pdf", "cosines.png"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == names
    assert "6 pairs (seed 0) at 4 times" in out
    assert "n = 20, d = 48" in out
    found = json.loads((tmp_path / "cosines.json").read_text())
    assert found["settings"] == {
        "pairs": 6, "times": 4, "seed": 0, "points": "two moons", "point_count": 7,
    }  # fmt: skip
    store = ImageStore.open(home / "out")
    assert found["provenance"]["inputs"]["index"]["fingerprint"] == store.fingerprint
    assert found["provenance"]["field"] == "exact"
    before = {name: (tmp_path / name).read_bytes() for name in names}
    for name in ("cosines.png", "cosines.pdf"):
        (tmp_path / name).unlink()
    code, _, _ = run("figures", "cosines", "--out", tmp_path, "--redraw")
    assert code == 0
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    with Image.open(tmp_path / "cosines.png") as picture:
        assert picture.info == {}
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20
    assert b"CreationDate" not in before["cosines.pdf"]


def test_what_is_missing_is_named(home: Path, run: Run, tmp_path: Path) -> None:
    index, out = home / "out", tmp_path / "o"
    for arguments, said in (
        (["cosines"], "--index was not named: wanted the folder of the index"),
        (["trajectories"], "--index was not named"),
        (["dimension"], "neither --source nor --index was named"),
        (["dimension", "--source", tmp_path / "no"], "no: no such file or folder"),
        (["cosines", "--index", tmp_path / "no"], "no"),
        (["cosines", "--index", index, "--pairs", "0"], "pairs is 0: wanted a whole number of at least 1"),
        (["cosines", "--index", index, "--tolerance", "0.01"], "nnflow index"),
        (["plane", "--times", "0.5,1"], "times is 1.0"),
        (["trajectories", "--index", index, "--run", home / "run"], "trained on other images"),
        (["trajectories", "--index", index, "--run", tmp_path / "no"], "no"),
        (["cosines", "--redraw"], "no such file; wanted the results of nnflow figures"),
        (["capacities"], "No such command 'capacities'"),
    ):
        code, _, err = run("figures", *arguments, *(["--out", out] if arguments != ["capacities"] else []))
        assert code == 2, arguments
        assert said in one_line(err), err
    (tmp_path / "file").write_text("")
    code, _, err = run("figures", "cosines", "--index", index, "--out", tmp_path / "file" / "x")
    assert code == 2
    assert "choose another path" in one_line(err)


@dataclass(frozen=True, kw_only=True)
class Quick(CosineSettings):
    pairs: int = knob(4, "pairs", low=1)
    times: int = knob(3, "times", low=2)
    point_count: int = knob(4, "points", low=1)


def test_all_makes_what_it_can_and_tells_what_it_cannot(
    home: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one quick experiment that works, one that lacks a run, and one that would train for days."""
    some = {
        "capacity": EXPERIMENTS["capacity"],
        "trajectories": replace(EXPERIMENTS["trajectories"], needs=("index", "run")),
        "cosines": replace(COSINES, settings=Quick),
    }
    monkeypatch.setattr(sys.modules["nnflow.cli.figures"], "EXPERIMENTS", some)
    code, out, err = run("figures", "all", "--index", home / "out", "--out", tmp_path)
    assert code == 2
    assert err.count("trajectories: --run was not named") == 2  # when it happens, and at the end
    assert "capacity: trains networks; make it by nnflow figures capacity --index OUT" in err
    assert not (tmp_path / "parts" / "capacity").exists()
    assert out.splitlines()[-1] == str(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "nnflow figures trajectories --index OUT --run RUN" in page
    assert (tmp_path / "cosines.png").exists()
