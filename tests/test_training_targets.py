"""Training: which field answers, targets made beside the network, and what is told of them."""

import contextlib
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from runs import points, same, spied, thirteen, tiny, workers

from nnflow import trainer
from nnflow.batches import Batches
from nnflow.calibrating import calibrate
from nnflow.errors import CheckpointError, InputError, StoreError
from nnflow.index import NeighbourIndex
from nnflow.settling import SETTLING, write_settling
from nnflow.store import ImageStore
from nnflow.targets import make_matcher
from nnflow.training import train
from nnflow.unet import newest_checkpoint
from nnflow.velocity import EmpiricalVelocity


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are tiny here: threads would only wait for each other."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return thirteen(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def straight(store, tmp_path_factory):
    """A run that nothing disturbed."""
    return train(store, tmp_path_factory.mktemp("runs") / "straight", tiny())


@pytest.mark.parametrize("knobs", [{}, {"target": "efm"}, {"target": "efm-unbiased", "k": 3}])
def test_targets_made_beside_the_network_are_the_same(store, straight, tmp_path, knobs):
    """And the thread that makes them has ended with the run."""
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    runs = [
        train(index, tmp_path / prefetch, tiny(**knobs, prefetch=prefetch)).checkpoint
        for prefetch in ("on", "off")
    ]
    same(*runs)
    if not knobs:
        same(runs[0], straight.checkpoint)
    assert not workers()


@pytest.mark.parametrize("prefetch", ["on", "off"])
def test_a_target_that_fails_stops_its_step_and_keeps_those_before(store, tmp_path, monkeypatch, prefetch):
    def fail(step, ut):
        if step == 4:
            raise StoreError("images.h5: input/output error")
        return ut

    spied(monkeypatch, fail)
    with pytest.raises(StoreError, match=r"^images\.h5: input/output error$"):
        train(store, tmp_path / "run", tiny(checkpoint_every=1, prefetch=prefetch))
    assert newest_checkpoint(tmp_path / "run").name == "step-00000003"
    assert not workers()


@pytest.mark.parametrize(("device", "ahead"), [("cpu", False), ("cuda", True)])
def test_unasked_targets_are_made_beside_the_network_on_a_gpu_only(device, ahead, monkeypatch):
    """There are no spare cores for them on the CPU."""
    asked = []

    @contextlib.contextmanager
    def supply(batches, steps, *, ahead):
        asked.append((steps, ahead))
        yield None

    monkeypatch.setattr(trainer, "supply", supply)
    fake = SimpleNamespace(config=tiny(), device=torch.device(device), batches=None, step=2)
    with trainer.Trainer.supplied(fake):
        pass
    assert asked == [(range(2, 6), ahead)]


def test_the_pace_is_told(store, tmp_path, monkeypatch):
    """Targets take 20 ms at least: those of 6 steps, made by and by or while the network is at its step."""

    def slow(step, ut):
        time.sleep(0.02)
        return ut

    spied(monkeypatch, slow)
    runs = {
        prefetch: train(store, tmp_path / prefetch, tiny(prefetch=prefetch)) for prefetch in ("off", "on")
    }
    for prefetch, done in runs.items():
        seconds = 6 * 6 / done.pace.images_per_second
        assert 0.12 <= done.pace.on_targets * seconds < seconds < done.seconds
        assert done.pace.estimates is None
        rates = points(done.folder, "images_per_second")
        assert [step for step, _ in rates] == [2, 4, 6]
        assert sum(12 / rate for _, rate in rates) == pytest.approx(seconds, rel=1e-5)
        waiting = [
            share * 12 / rate
            for (_, share), (_, rate) in zip(
                points(done.folder, "share_of_time_waiting_for_targets"), rates, strict=True
            )
        ]
        assert sum(waiting) == pytest.approx(done.pace.waiting * seconds, rel=1e-5)
        assert (done.pace.waiting >= done.pace.on_targets) or prefetch == "on"


def test_the_estimates_behind_the_targets_are_told(store, tmp_path):
    """As the batches made again say: of entries of two steps, and of the run."""
    done = train(store, tmp_path / "run", tiny(target="efm", prefetch="on"))
    field = EmpiricalVelocity.exact(store, flip=True, device="cpu")
    again = Batches(
        store,
        make_matcher("efm", store, field=field, flip=True),
        tiny(),
        size=6,
        rank=0,
        device=torch.device("cpu"),
    )
    log_ess = []
    for step in range(6):
        batch = again.make(step)
        log_ess.append(field.estimate(batch.xt, batch.t, batch.labels).ess.log().mean().item())
    told = dict(points(done.folder, "targets/effective_images"))
    assert told == pytest.approx(
        {2 * i + 2: math.exp((log_ess[2 * i] + log_ess[2 * i + 1]) / 2) for i in range(3)}, rel=1e-5
    )
    assert done.pace.estimates.ess == pytest.approx(math.exp(sum(log_ess) / 6), rel=1e-5)
    assert (done.pace.estimates.asked, done.pace.estimates.certified) == (1, 1)
    assert points(done.folder, "targets/tail_mass") == [(2, 0), (4, 0), (6, 0)]


@pytest.mark.parametrize("target", ["cfm", "efm", "efm-unbiased"])
def test_every_target_trains(store, tmp_path, target):
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    done = train(index, tmp_path / "run", tiny(target=target, field="nearest", k=3, steps=2))
    assert 0 < done.loss < 10


def test_neighbours_need_an_index(store, tmp_path):
    for knobs in (
        {"target": "efm", "field": "nearest"},
        {"target": "efm", "field": "near-and-far"},
        {"target": "efm-unbiased"},
        {"target": "efm-unbiased", "field": "near-and-far"},
    ):
        with pytest.raises(InputError, match="needs neighbours: pass a NeighbourIndex"):
            train(store, tmp_path / "run", tiny(**knobs))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def calibrated(store, tmp_path):
    """An index of the same images in a folder of its own, calibrated; as small as this, all by exact sums."""
    folder = tmp_path / "index"
    shutil.copytree(store.folder, folder)
    index = NeighbourIndex.build(ImageStore.open(folder), folder, rank="pixels")
    calibrate(index, queries=2, seconds=0.1)
    return index


def test_near_and_far_follows_the_calibration(store, calibrated, tmp_path):
    """Exact at every time here, so the same weights as the exact field gives."""
    knobs = {"target": "efm", "steps": 2}
    exact = train(store, tmp_path / "exact", tiny(**knobs, field="exact"))
    same(
        exact.checkpoint, train(calibrated, tmp_path / "run", tiny(**knobs, field="near-and-far")).checkpoint
    )


@pytest.mark.parametrize("target", ["efm", "efm-unbiased"])
def test_where_all_images_have_settled_it_is_cfm(store, calibrated, tmp_path, target):
    cfm = train(store, tmp_path / "cfm", tiny(target="cfm", steps=2))
    write_settling(calibrated.store, torch.zeros(len(store)))
    knobs = {"target": target, "field": "near-and-far", "steps": 2}
    same(cfm.checkpoint, train(calibrated, tmp_path / "run", tiny(**knobs)).checkpoint)


@pytest.mark.parametrize(
    ("target", "field", "asked"),
    [
        ("efm", "near-and-far", {"tolerance": 0.03}),
        ("efm-unbiased", "near-and-far", {"tolerance": 0.03}),
        ("efm", "nearest", {"k": 3}),
        ("efm-unbiased", "nearest", {"k": 3}),
        ("efm-unbiased", "exact", {"k": 3}),
        ("efm", "exact", {}),
        ("cfm", "near-and-far", None),
    ],
)
def test_which_field_answers(calibrated, tmp_path, monkeypatch, target, field, asked):
    seen = []

    def spied(name):
        usual = getattr(EmpiricalVelocity, name)

        def spy(source, *, flip, **rest):
            assert flip
            seen.append({key: value for key, value in rest.items() if key in ("k", "tolerance")})
            return usual(source, flip=flip, **rest)

        monkeypatch.setattr(EmpiricalVelocity, name, spy)

    for name in ("exact", "nearest", "near_and_far"):
        spied(name)
    knobs = {"target": target, "field": field, "tolerance": 0.03, "k": 3, "steps": 1}
    train(calibrated, tmp_path / "run", tiny(**knobs))
    assert seen == ([] if asked is None else [asked])


def test_near_and_far_needs_a_calibration(store, tmp_path):
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    with pytest.raises(StoreError, match="has not been calibrated; run: nnflow calibrate"):
        train(index, tmp_path / "run", tiny(target="efm", field="near-and-far"))
    assert not (tmp_path / "run").exists()


def test_another_calibration_is_another_run(calibrated, tmp_path):
    knobs = tiny(target="efm", field="near-and-far", steps=2)
    train(calibrated, tmp_path / "run", knobs)
    train(calibrated, tmp_path / "run", knobs.replace({"steps": 3}), resume=True)
    write_settling(calibrated.store, torch.ones(len(calibrated)))
    with pytest.raises(
        CheckpointError, match=r"index were .*settling times none, now .*settling times \w{16}"
    ):
        train(calibrated, tmp_path / "run", knobs, resume=True)
    (calibrated.folder / SETTLING).unlink()
    calibrate(calibrated, queries=3, seconds=0.1)
    with pytest.raises(
        CheckpointError, match=r"index were embedding .*, calibration \w{16}, .* now embedding"
    ):
        train(calibrated, tmp_path / "run", knobs, resume=True)


def test_another_index_is_another_run(store, tmp_path):
    knobs = tiny(target="efm", field="nearest", k=3, steps=2)
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    train(index, tmp_path / "run", knobs)
    index = NeighbourIndex.build(store, store.folder, rank=2)
    with pytest.raises(CheckpointError, match=r"index were flat, rank pixels.*, now flat, rank 2"):
        train(index, tmp_path / "run", knobs, resume=True)
