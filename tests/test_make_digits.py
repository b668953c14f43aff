"""scripts/make_digits.py: every digit, its pixels and class, in the right folder, once."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_digits.py"

sklearn_datasets = pytest.importorskip("sklearn.datasets")
main = runpy.run_path(str(SCRIPT))["main"]


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Written as a user does it."""
    folder = tmp_path_factory.mktemp("made") / "digits"
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return folder, done.stdout


def test_every_digit_is_there_with_its_pixels_and_class(made):
    folder, said = made
    digits = sklearn_datasets.load_digits()
    files = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    assert len(files) == 1797
    assert not (folder / "held-out").exists()
    for number, path in enumerate(files):
        assert path.name == f"{number:04d}.png"
        assert path.parent == folder / "train" / str(digits.target[number])
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
            # 0 ... 16 onto 0 ... 255, to the nearest grey level
            assert np.abs(np.asarray(image) - digits.images[number] * 255 / 16).max() <= 0.5
    assert "1797 training and 0 held-out digits, 1797 new" in said


def test_the_same_command_changes_nothing(made, capsys):
    folder, _ = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    run(folder)
    assert ", 0 new" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before


def test_held_out_takes_every_kth_of_each_class_and_gives_it_back(made, tmp_path):
    whole = tree(made[0])
    folder = tmp_path / "digits"
    run(folder, "--held-out", 5)
    split = tree(folder)
    held = {name for name in split if name.startswith("held-out/")}
    for digit in range(10):
        names = sorted(name for name in whole if name.startswith(f"train/{digit}/"))
        expected = {name.replace("train", "held-out") for name in names[4::5]}
        assert {name for name in held if name.split("/")[1] == str(digit)} == expected
    assert {n.replace("held-out", "train"): data for n, data in split.items()} == whole
    assert len(split) == 1797  # none in both
    (folder / "train" / "3" / "mine.png").write_bytes(b"not ours")
    run(folder)
    again = tree(folder)
    assert again.pop("train/3/mine.png") == b"not ours"
    assert again == whole


def test_a_spoilt_file_is_written_again(made, tmp_path, capsys):
    folder = tmp_path / "digits"
    run(folder)
    (folder / "train" / "0" / "0000.png").write_bytes(b"")
    capsys.readouterr()
    run(folder)
    assert ", 1 new" in capsys.readouterr().out
    assert tree(folder) == tree(made[0])


@pytest.mark.parametrize("arguments", [("--held-out", "1"), ("--held-out", "-2"), ("--seed", "3")])
def test_wrong_options_exit_with_2(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "digits", *arguments)
    assert arguments[0] in capsys.readouterr().err
    assert not (tmp_path / "digits").exists()


def test_a_file_in_the_way_is_told_in_a_line(tmp_path, capsys):
    (tmp_path / "digits").write_text("")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "digits")
    assert "name another OUT" in capsys.readouterr().err
