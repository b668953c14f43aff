"""Run folders: whole or absent at any moment, and refused in one line when damaged."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from nnflow.checkpoint import RunRecord, load, read_record, save, start_run
from nnflow.config import resolve
from nnflow.errors import CheckpointError, StoreError
from nnflow.unet import (
    STATE,
    WEIGHTS,
    LearnedVelocity,
    build,
    check_files,
    newest_checkpoint,
    read_state,
)

SHAPE = (1, 4, 4)


def record(**knobs):
    knobs = {"channels": (8,), "head_dim": 8, "attention": (), "keep": 2} | knobs
    return RunRecord(
        config=resolve("digits", knobs),
        images="a" * 16,
        index="none",
        shape=SHAPE,
        classes=("\x1bcat", "dog"),
    )


def trained(steps, seed=0, **knobs):
    """A network, its average and Adam, after some steps on noise."""
    config = record(**knobs).config
    network = build(config, SHAPE)
    ema = build(config, SHAPE)
    adam = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        adam.zero_grad()
        x = torch.randn(2, *SHAPE, generator=generator)
        (network(x, 0.5) - x).square().mean().backward()
        adam.step()
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), network.parameters(), strict=True):
                mine.lerp_(theirs, 0.3)
    return network, ema, adam


def write(run, step, parts, **knobs):
    network, ema, adam = parts
    return save(
        run,
        step=step,
        network=network,
        ema=ema,
        optimizer=adam,
        record=record(**knobs),
        extra={"processes": 1},
    )


def assert_equal(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def same(one, other):
    for mine, theirs in zip(one[:2], other[:2], strict=True):
        assert_equal(mine, theirs)
    mine, theirs = (part[2].state_dict()["state"] for part in (one, other))
    assert mine.keys() == theirs.keys()
    for row in mine:
        for name, value in mine[row].items():
            assert torch.equal(value, theirs[row][name]), (row, name)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    start_run(folder, record(), resume=False)
    return folder


def test_a_checkpoint_gives_every_bit_back(run):
    parts = trained(3)
    place = write(run, 3, parts)
    fresh = trained(1, seed=9)
    network, ema, adam = fresh
    step, extra = load(place, network=network, ema=ema, optimizer=adam)
    assert (step, extra) == (3, {"processes": 1})
    same(parts, fresh)
    assert len(adam.state_dict()["state"]) == len(list(network.parameters()))


def test_a_checkpoint_before_the_first_step_gives_a_fresh_adam_back(run):
    parts = trained(0)
    place = write(run, 0, parts)
    network, ema, adam = trained(2, seed=9)
    load(place, network=network, ema=ema, optimizer=adam)
    again = trained(0)
    for one in ((network, ema, adam), again):
        one[2].zero_grad()
        one[0](torch.ones(1, *SHAPE), 0.5).square().sum().backward()
        (one[0](torch.ones(1, *SHAPE), 0.5) - 1).square().sum().backward()
        one[2].step()
    same((network, ema, adam), again)


def test_ema_opens_by_simple_names_here_and_in_diffusers(run):
    parts = trained(2)
    place = write(run, 2, parts)
    for folder in (run, place, run / "latest", run / "latest" / "ema"):
        assert_equal(LearnedVelocity.open(folder, device="cpu"), parts[1])
    last = LearnedVelocity.open(run, ema=False, device="cpu")
    assert_equal(last, parts[0])
    assert last.config == record().config
    bias = last.state_dict()["unet.conv_out.bias"]
    assert not torch.equal(bias, parts[1].state_dict()["unet.conv_out.bias"])
    assert_equal(UNet2DModel.from_pretrained(run / "latest" / "ema"), parts[1].unet)


def test_the_newest_are_kept(run):
    parts = trained(1)
    for step in (5, 10, 200, 1000):
        write(run, step, parts)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step-00000200", "step-00001000"]
    assert newest_checkpoint(run).name == "step-00001000"
    assert (run / "latest").resolve() == newest_checkpoint(run).resolve()


def snapshots(monkeypatch, run, into):
    """Copies of `run` before every change of its tree and every sync, as a kill would leave it."""
    into.mkdir()
    count, shooting = iter(range(10_000)), []

    def shoot(function):
        def before(*args, **kwargs):
            if not shooting:  # copying makes folders too
                shooting.append(True)
                shutil.copytree(run, into / f"{next(count):04d}", symlinks=True)
                shooting.clear()
            return function(*args, **kwargs)

        return before

    for name in ("replace", "rename", "fsync", "symlink", "mkdir", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, shoot(getattr(os, name)))


def test_killed_at_any_moment_a_whole_checkpoint_is_found(run, tmp_path, monkeypatch):
    parts = {step: trained(step) for step in (1, 2, 3, 4)}
    for step in (1, 2):
        write(run, step, parts[step])
    with monkeypatch.context() as patch:
        snapshots(patch, run, tmp_path / "shots")
        for step in (3, 4):
            write(run, step, parts[step])
    shots = sorted((tmp_path / "shots").iterdir())
    found = []
    for shot in shots:
        network, ema, adam = trained(0)
        step, _ = load(newest_checkpoint(shot), network=network, ema=ema, optimizer=adam)
        same(parts[step], (network, ema, adam))
        assert (shot / "latest" / "ema" / WEIGHTS).is_file()
        for place in shot.glob("checkpoints/step-????????"):  # nor does an older one lose parts
            check_files(place, read_state(place))
        found.append(step)
    assert found == sorted(found)
    assert set(found) == {2, 3, 4}
    assert len(shots) > 40
    for shot in (shots[len(shots) // 4], shots[-1]):  # and what is left over is cleared away
        write(shot, 9, parts[1])
        names = [path.name for path in (shot / "checkpoints").iterdir()]
        assert len(names) == 2, names
        assert not [name for name in names if name.endswith(".partial")]


def test_a_full_disk_is_one_line_and_keeps_what_was(run):
    """A limit on file sizes stands in for the full disk; 1 MB of weights does not fit in 64 KB."""
    write(run, 1, trained(1))
    wide = trained(0, channels=(64,))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, usual[1]))
        with pytest.raises(StoreError, match=r"^writing .*step-00000002: .*") as caught:
            write(run, 2, wide, channels=(64,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert (run / "latest").resolve().name == "step-00000001"


NAMES = [
    *("unet/config.json", "unet/" + WEIGHTS, "ema/config.json", "ema/" + WEIGHTS),
    "optimizer.safetensors",
]


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def gone(path):
    path.unlink()


def swapped(path):
    """As long as before, and valid in itself."""
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        save_file({name: value + 1 for name, value in tensors.items()}, path)
    else:
        path.write_text(path.read_text().replace("nnflow", "mmflow").replace("silu", "relu"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in NAMES for damage in (cut, gone, swapped)] + [(STATE, cut), (STATE, gone)],
)
def test_a_damaged_file_is_named_in_one_line(run, name, damage):
    parts = trained(1)
    write(run, 1, parts)
    place = write(run, 2, parts)
    damage(place / name)
    network, ema, adam = parts
    with pytest.raises(CheckpointError) as caught:
        load(place, network=network, ema=ema, optimizer=adam)
    message = str(caught.value)
    assert "\n" not in message
    assert str(place / name) in message
    assert "delete step-00000002" in message
    if name.startswith("unet/") or name == STATE:
        with pytest.raises(CheckpointError, match=name.rpartition("/")[2]):
            LearnedVelocity.open(run, ema=False)
    shutil.rmtree(place)
    assert load(newest_checkpoint(run), network=network, ema=ema, optimizer=adam)[0] == 1


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"step": 1}', "\x00", '{"config": {"steps": -1}, "step": 1, "files": {}}']
)
def test_a_foreign_state_is_refused(run, text):
    place = write(run, 1, trained(1))
    (place / STATE).write_text(text)
    with pytest.raises(CheckpointError, match=r"state\.json") as caught:
        LearnedVelocity.open(run)
    assert "\n" not in str(caught.value)


def test_files_of_another_network_do_not_fit(run):
    place = write(run, 1, trained(1, channels=(16,)), channels=(16,))
    network, ema, adam = trained(0)
    with pytest.raises(CheckpointError, match=r"unet/diffusion.*of another network"):
        load(place, network=network, ema=ema, optimizer=adam)


def test_a_state_without_marks_vouches_for_nothing(run):
    place = write(run, 1, trained(1))
    state = json.loads((place / STATE).read_text())
    state["files"] = {}
    (place / STATE).write_text(json.dumps(state))
    network, ema, adam = trained(0)
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(place, network=network, ema=ema, optimizer=adam)


def test_a_record_survives(run):
    assert read_record(run) == record()


def test_a_run_is_not_started_over(run):
    with pytest.raises(CheckpointError, match="already; continue it with --resume"):
        start_run(run, record(), resume=False)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="no run to resume; leave out --resume"):
        start_run(tmp_path / "new", record(), resume=True)
    assert not (tmp_path / "new").exists()


def test_other_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex; name a new folder"):
        start_run(tmp_path, record(), resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"kind": "nnflow run"}', "{", '{"kind": "x"}'])
def test_a_foreign_config_is_refused(run, text):
    (run / "config.json").write_text(text)
    for resume in (True, False):
        with pytest.raises(CheckpointError) as caught:
            start_run(run, record(), resume=resume)
        assert "\n" not in str(caught.value)
    assert (run / "config.json").read_text() == text


def test_a_run_goes_on_with_what_it_was_started_with_only(run):
    longer = record(steps=10**6, log_every=7)
    start_run(run, longer, resume=True)
    assert read_record(run) == longer
    other = RunRecord(
        config=resolve("digits", longer.config.to_json() | {"seed": 4, "clip": 0.0}),
        images="b" * 16,
        index="flat",
        shape=(1, 4, 5),
    )
    with pytest.raises(CheckpointError) as caught:
        start_run(run, other, resume=True)
    message = str(caught.value)
    assert "\n" not in message
    assert "\x1b" not in message
    for part in (
        "clip was 1.0, now 0.0",
        "seed was 0, now 4",
        f"images were {'a' * 16}, now {'b' * 16}",
        "index were none, now flat",
        "shape were (1, 4, 4), now (1, 4, 5)",
        "dog",
    ):
        assert part in message
    assert read_record(run) == longer


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a file stands where a folder was wanted"):
        start_run(tmp_path / "file" / "run", record(), resume=False)
