"""scripts/make_large_set.py: the originals, then copies changed as it says, the same each time."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from stores import store_of

from nnflow import ImageStore, hdf5file

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_large_set.py"
script = runpy.run_path(str(SCRIPT))
N, SIDE = 30, 12


@pytest.fixture
def source(tmp_path: Path) -> ImageStore:
    pixels = torch.randint(0, 256, (N, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return store_of(pixels.to(torch.uint8), tmp_path, classes=["a"] * 10 + ["b"] * 20)


def run(monkeypatch: pytest.MonkeyPatch, source: ImageStore, out: Path, *more: str) -> int:
    monkeypatch.setattr(sys, "argv", ["make_large_set", str(source.folder), str(out), *more])
    return script["main"]()


def test_originals_then_copies_the_same_each_time(
    source: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        assert run(monkeypatch, source, tmp_path / name, "--count", "75", "--seed", seed) == 0
    one, same, other = (ImageStore.open(tmp_path / name) for name in ("one", "same", "other"))
    assert one.shape == (75, 3, SIDE, SIDE)
    assert torch.equal(one.pixels[:N], source.pixels)
    assert one.paths[2 * N + 3] == f"{source.paths[3]} 2"
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert (one.pixels[N : 2 * N] != source.pixels).float().mean() > 0.9
    assert "0 of 75 sampled have another within 4 grey levels" in capsys.readouterr().out


def test_a_second_command_reuses_or_refuses(
    source: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "large"
    assert run(monkeypatch, source, out, "--count", "40") == 0
    before = (out / "images.h5").stat().st_mtime_ns
    assert run(monkeypatch, source, out, "--count", "40") == 0
    assert (out / "images.h5").stat().st_mtime_ns == before
    for other in (("--count", "41"), ("--count", "40", "--seed", "1")):
        assert run(monkeypatch, source, out, *other) == 2
        assert "holds other images" in capsys.readouterr().err
    assert run(monkeypatch, source, tmp_path / "few", "--count", "29") == 2
    assert "wanted at least the originals" in capsys.readouterr().err


def test_copies_are_shifts_and_mirror_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without colour changes every copy is one of 2 x 9 x 9 pictures, and all of them occur."""
    change = script["changed"]
    for name in ("CONTRAST", "GAIN", "BRIGHTNESS"):
        monkeypatch.setitem(change.__globals__, name, 0.0)
    image = torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(image.float(), (4, 4, 4, 4), mode="reflect")
    possible = {
        bytes(crop.byte().numpy().tobytes())
        for view in (padded, padded.flip(3))
        for down in range(9)
        for right in range(9)
        for crop in [view[0, :, down : down + SIDE, right : right + SIDE].contiguous()]
    }
    copies = change(image.byte().expand(3000, -1, -1, -1), torch.Generator().manual_seed(2))
    assert {bytes(copy.numpy().tobytes()) for copy in copies} == possible
    assert len(possible) == 162


def test_colours_change_within_their_limits() -> None:
    """A grey image stays grey but for the channels' gains; its level moves by brightness and gain."""
    grey = torch.full((4000, 3, SIDE, SIDE), 100, dtype=torch.uint8)
    copies = script["changed"](grey, torch.Generator().manual_seed(3)).float()
    assert (copies.amax((2, 3)) == copies.amin((2, 3))).all()
    levels = copies[:, :, 0, 0]
    assert 70 <= levels.min() < 74
    assert 126 < levels.max() <= 130
    assert (levels.mean() - 100).abs() < 1
    apart = (levels[:, 0] - levels[:, 1]).std()  # of two gains' difference: 100 * 0.1 * sqrt(2 / 3)
    assert 7.8 < apart < 8.6
    white = script["changed"](torch.full_like(grey, 255), torch.Generator().manual_seed(3))
    assert white.min() >= 209
    assert (white == 255).float().mean() > 0.4
    halves = grey.clone()
    halves[:, :, :6] = 50
    spread = script["changed"](halves, torch.Generator().manual_seed(4)).float()
    contrast = (spread.amax((2, 3)) - spread.amin((2, 3)))[:, 0] / 50
    assert 0.8 * 0.9 - 0.03 <= contrast.min() < 0.76
    assert 1.28 < contrast.max() <= 1.2 * 1.1 + 0.03


def test_near_duplicates_are_counted(source: ImageStore) -> None:
    """Row 7 is made nearly row 3; against distances one by one."""
    path = source.folder / "images.h5"
    pixels = source.pixels.clone()
    pixels[7] = pixels[3] ^ 1
    with path.open("r+b") as file:
        file.seek(hdf5file.read_header(path).pixels_at)
        file.write(pixels.numpy().tobytes())
    near = script["near_duplicates"](path, 0)
    distances = torch.cdist(pixels.double(), pixels.double()).fill_diagonal_(torch.inf).amin(1)
    wanted = distances / pixels.shape[1] ** 0.5
    assert near.rows.tolist() == list(range(N))
    torch.testing.assert_close(near.levels.double(), wanted, rtol=1e-4, atol=0.1)
    assert near.duplicated == 2
