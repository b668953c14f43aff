"""What a build keeps: whole after any kill, taken up by the same build only, and worth its cost."""

import json
import os
from pathlib import Path

import pytest
import torch
from refusals import refused

from nnflow import unfinished as module
from nnflow.errors import StoreError
from nnflow.unfinished import FOLDER, Unfinished, discard

PLAN = {"rank": 12, "kind": "flat", "step": None}


def text(content: str):  # type: ignore[no-untyped-def]
    return lambda path: path.write_text(content)


def test_what_was_kept_last_is_found_by_the_next_build(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, PLAN)
    assert kept.find("a") is None
    for content in ("one", "two", "three"):
        kept.keep("a", text(content))
    kept.keep("b", text("other"))
    again = Unfinished(tmp_path, dict(PLAN))
    for here in (kept, again):
        assert [here.find(name).read_text() for name in "ab"] == ["three", "other"]  # type: ignore[union-attr]
    assert len(list(again.folder.iterdir())) == 3
    again.forget("a", "c")
    assert Unfinished(tmp_path, PLAN).find("a") is None
    assert len(list(again.folder.iterdir())) == 2
    again.remove()
    assert not list(tmp_path.iterdir())


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, PLAN)
    tensors = {"a": torch.rand(5, 7, dtype=torch.float64).T, "b": torch.tensor(3), "c": torch.zeros(0)}
    kept.keep_tensors("t", tensors)
    found = Unfinished(tmp_path, PLAN).find_tensors("t")
    assert found is not None
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    assert kept.find_tensors("u") is None
    kept.keep("v", text("no tensors"))
    assert kept.find_tensors("v") is None


@pytest.mark.parametrize("change", [{"rank": 11}, {"step": 4}, {"more": 1}])
def test_another_plan_starts_from_nothing(tmp_path: Path, change: dict[str, int]) -> None:
    Unfinished(tmp_path, PLAN).keep("a", text("one"))
    (tmp_path / FOLDER / "coordinates.npy").write_bytes(b"rows")
    other = Unfinished(tmp_path, PLAN | change)
    assert other.find("a") is None
    assert [path.name for path in other.folder.iterdir()] == ["state.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"plan": 3}', None])
def test_a_state_that_is_none_starts_from_nothing(tmp_path: Path, content: str | None) -> None:
    kept = Unfinished(tmp_path, PLAN)
    kept.keep("a", text("one"))
    state = kept.folder / "state.json"
    if content is None:
        content = json.dumps(json.loads(state.read_text()) | {"files": 7})
    state.write_text(content)
    assert Unfinished(tmp_path, PLAN).find("a") is None


@pytest.mark.parametrize("damage", ["cut", "other", "gone", "folder"])
def test_a_file_that_is_not_the_one_kept_is_not_found(tmp_path: Path, damage: str) -> None:
    path = Unfinished(tmp_path, PLAN).keep("a", text("content"))
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_text({"cut": "conten", "other": "contenu"}[damage])
    assert Unfinished(tmp_path, PLAN).find("a") is None


def test_leftovers_of_a_kill_go_and_other_files_stay(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, PLAN)
    kept.keep("a", text("one"))
    for name in ("a.2", "a.2.partial", "b.17", "coordinates.npy"):
        (kept.folder / name).write_bytes(b"left")
    assert Unfinished(tmp_path, PLAN).find("a")
    assert sorted(os.listdir(kept.folder)) == ["a.1", "coordinates.npy", "state.json"]


def test_a_write_that_fails_leaves_what_was_kept_before(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, PLAN)
    kept.keep("a", text("one"))

    def full(path: Path) -> None:
        path.write_text("o")
        raise OSError(28, os.strerror(28))

    with refused(StoreError, "a.2: no space left on device; free space .*what is built so far is kept"):
        kept.keep("a", full)
    found = Unfinished(tmp_path, PLAN).find("a")
    assert found is not None
    assert found.read_text() == "one"


def test_keeping_is_due_by_the_clock_and_takes_a_twentieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    kept = Unfinished(tmp_path, PLAN)

    def slow(path: Path) -> None:
        nonlocal now
        now += 3.0
        path.write_text("kept")

    for wait, write in ((10.0, text("quick")), (10.0, slow), (60.0, text("quick")), (10.0, slow)):
        now += wait - 0.01
        assert not kept.due
        now += 0.02
        assert kept.due
        kept.keep("a", write)


def test_nothing_to_discard(tmp_path: Path) -> None:
    discard(tmp_path)
    discard(tmp_path / "absent")
    Unfinished(tmp_path, PLAN)
    discard(tmp_path)
    assert not list(tmp_path.iterdir())
