"""What goes wrong under way is named in one line, and what was there before is kept."""

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import refused
from runs import points, spied, thirteen, tiny
from torch.utils import tensorboard

from nnflow.cli import main
from nnflow.errors import BudgetError, NNFlowError, StoreError
from nnflow.memory import parse_bytes, rows_within, whole_memory, working_memory
from nnflow.scan import nearest_images
from nnflow.store import ImageStore
from nnflow.training import train
from nnflow.unet import newest_checkpoint
from nnflow.velocity import EmpiricalVelocity


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return thirteen(tmp_path)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"nnflo")


@pytest.mark.parametrize("change", [cut, overwrite])
def test_a_store_that_is_changed_under_an_open_field_is_named(
    store: ImageStore, change: Callable[[Path], None]
) -> None:
    """Reading beyond the end of a map that was cut would end the process."""
    field = EmpiricalVelocity.exact(store, device="cpu")
    x = torch.zeros(2, 1, 4, 4)
    field(x, 0.5)
    change(store.folder / "images.h5")
    for ask in (
        lambda: field(x, 0.5),
        lambda: store.images(torch.tensor([0])),
        lambda: nearest_images(store, x, 1),
    ):
        with refused(StoreError, r"images\.h5: written to since it was opened \(\d+ bytes then, \d+ now\)"):
            ask()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_a_store_that_is_replaced_or_removed_is_still_there_for_who_has_it_open(
    store: ImageStore, how: str
) -> None:
    """A build puts the new file there by a rename: the map is of the old one."""
    path, ids = store.folder / "images.h5", torch.arange(13)
    field = EmpiricalVelocity.exact(store, device="cpu")
    before, wanted = store.images(ids), field(torch.zeros(1, 1, 4, 4), 0.5)
    other = shutil.copy(path, path.with_name("other"))
    overwrite(Path(other))
    Path(other).replace(path) if how == "replaced" else path.unlink()
    assert torch.equal(store.images(ids), before)
    assert torch.equal(field(torch.zeros(1, 1, 4, 4), 0.5), wanted)


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_a_store_that_is_cut_while_a_network_trains_on_it(
    store: ImageStore, tmp_path: Path, prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that needs the images says so; the checkpoints before are kept."""

    def break_it(step: int, ut: torch.Tensor) -> torch.Tensor:
        if step == 4:
            cut(store.folder / "images.h5")
        return ut

    spied(monkeypatch, break_it)
    config = tiny(checkpoint_every=1, steps=9, prefetch=prefetch)
    with refused(StoreError, r"images\.h5: written to since it was opened"):
        train(store, tmp_path / "run", config)
    kept = newest_checkpoint(tmp_path / "run")
    assert kept is not None
    assert kept.name == "step-00000004"


def test_a_disk_that_fills_while_the_diary_is_written(
    store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard hands on what its thread met; the points and checkpoints before are kept."""
    usual = tensorboard.SummaryWriter.add_scalar

    def full(self: object, name: str, value: float, step: int) -> None:
        if step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        usual(self, name, value, step)

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
    with refused(StoreError, r"writing in .*logs: no space left on device; free space .* is kept"):
        train(store, tmp_path / "run", tiny(checkpoint_every=1))
    kept = newest_checkpoint(tmp_path / "run")
    assert kept is not None
    assert kept.name == "step-00000003"
    assert [step for step, _ in points(tmp_path / "run")] == [2]
    monkeypatch.undo()
    assert train(store, tmp_path / "run", tiny(checkpoint_every=1), resume=True).step == 6


@pytest.mark.parametrize("needed", [1, 3_000, 100 << 20, 1 << 30])
def test_the_least_memory_is_enough_and_no_more(needed: int) -> None:
    least = whole_memory(needed)
    assert working_memory(least) >= needed > working_memory(least - 4)


@pytest.mark.filterwarnings("ignore::nnflow.errors.DegradedWarning")  # as small as this, of a subset
def test_a_budget_too_small_says_what_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The libraries take a part of --memory: of what is named the rest must be enough."""
    pixels = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    command = ["index", str(tmp_path / "images.npy"), str(tmp_path / "out"), "--size", "8", "--rank", "4"]
    command += ["--calibration-seconds", "0", "--memory"]

    def run(memory: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([*command, memory])
        told = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error" in line]
        return int(str(ended.value.code)), told[0] if told else ""

    code, told = run("2KiB")
    assert code == 2
    enough = re.search(r"--memory (\d+KiB)$", told)
    assert enough is not None, told
    assert parse_bytes(enough[1]) > 2048
    for _ in range(5):  # each stage asks for its own
        code, told = run(enough[1])
        if code == 0:
            break
        enough = re.search(r"--memory (\d+KiB)$", told)
        assert enough is not None, told
    assert code == 0
    assert (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(BudgetError) as caught:
        rows_within(10, 8, at_most=4, share=2)
    assert caught.value.least == 16
    assert isinstance(caught.value, NNFlowError)
