"""Experiments that train networks: what is kept, what is gone on with, and what is made of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import all_images, oracle, pixels_of
from PIL import Image
from stores import store_of

from nnflow.errors import CheckpointError, InputError
from nnflow.evaluation import draw_pairs
from nnflow.figures import networks
from nnflow.figures.capacity import EXPERIMENT as CAPACITY
from nnflow.figures.capacity import CapacitySettings
from nnflow.figures.experiment import Document
from nnflow.figures.inputs import Inputs
from nnflow.figures.networks import TrainingSettings, nearness, subset, subset_rows, trained, unseen
from nnflow.figures.parts import Parts
from nnflow.figures.tau import EXPERIMENT as TAU
from nnflow.figures.tau import TauSettings
from nnflow.index import NeighbourIndex
from nnflow.sampling import noise_of, sample
from nnflow.store import ImageStore
from nnflow.training import train
from nnflow.unet import LearnedVelocity
from nnflow.velocity import EmpiricalVelocity, HybridVelocity

TINY = {"preset": "digits", "channels": (8,), "head_dim": 8, "attention": (2,), "batch": 4, "steps": 3}


def index_of(folder: Path, count: int = 13, *, first: int = 0, classes: bool = True) -> NeighbourIndex:
    names = ["a"] * (count // 2) + ["b"] * (count - count // 2) if classes else None
    store = store_of(pixels_of(first + count)[first:], folder, classes=names)
    return NeighbourIndex.build(store, store.folder, rank=4)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path / "parts", {"experiment": "test"})


def test_settings_change_the_preset_where_they_say_so() -> None:
    plain = TrainingSettings(preset="digits").training("cfm", 3)
    assert (plain.steps, plain.channels, plain.flip, plain.seed) == (1_600, (32, 64), False, 3)
    changed = TrainingSettings(**TINY, flip="yes").training("efm-m", 0, samples=7, keep=3)
    assert (changed.steps, changed.channels, changed.flip, changed.samples) == (3, (8,), True, 7)
    assert (changed.checkpoint_every, changed.keep > 3, changed.learning_rate) == (1, True, 2e-3)
    with pytest.raises(InputError, match="12 is not a multiple of 8"):
        TrainingSettings(**TINY | {"channels": (12,)}).training("cfm", 0)


def test_subsets_are_nested_images_of_the_store(tmp_path: Path, parts: Parts) -> None:
    store = index_of(tmp_path).store
    few, many = (subset_rows(store, count, 5) for count in (4, 9))
    assert set(few) < set(many)
    made = subset(store, 4, 5, parts)
    assert torch.equal(made.pixels, store.pixels[torch.from_numpy(few)])
    names = [store.classes[store.labels[row]] for row in few]
    assert [made.classes[label] for label in made.labels] == names
    assert (
        subset(store, 4, 5, parts).fingerprint == made.fingerprint != subset(store, 4, 6, parts).fingerprint
    )
    assert subset(store, 13, 5, parts) is store
    with pytest.raises(InputError, match="14 images wanted, the index holds 13"):
        subset(store, 14, 5, parts)


def test_unseen_images_are_outside_the_subset(tmp_path: Path) -> None:
    index = index_of(tmp_path)
    inputs = Inputs(out=tmp_path, index=index.folder)
    others, about = unseen(inputs, 9, 5, at_most=3)
    pixels = {tuple(row) for row in index.store.pixels[subset_rows(index.store, 9, 5)].tolist()}
    rows = {tuple(row) for row in others.add(1).mul(127.5).round().byte().flatten(1).tolist()}
    assert len(rows) == 3
    assert not rows & pixels
    assert about["images"] == index.store.fingerprint
    assert unseen(inputs, 12, 5, at_most=3)[0] is None
    held_out = index_of(tmp_path / "held", 6, first=20).store
    named, about = unseen(replace(inputs, held_out=held_out.folder), 13, 5, at_most=3)
    assert about == {"images": named.fingerprint} == {"images": held_out.fingerprint}


def test_a_killed_training_goes_on_to_the_same_weights(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = index_of(tmp_path).store
    config = TrainingSettings(**TINY).training("cfm", 1, keep=3)
    straight = train(store, tmp_path / "straight", config).checkpoint

    def killed(source: ImageStore, folder: Path, config: object, **rest: bool) -> object:
        train(source, folder, replace(config, steps=1), **rest)
        (folder / "config.json").write_text((tmp_path / "straight" / "config.json").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        trained("run", store, config, parts)
    monkeypatch.setattr(networks, "train", train)
    folder = trained("run", store, config, parts)
    weights = "ema/diffusion_pytorch_model.safetensors"
    assert (folder / "latest" / weights).read_bytes() == (straight / weights).read_bytes()
    assert {path.name[-1] for path in (folder / "checkpoints").iterdir()} >= set("123")
    monkeypatch.setattr(networks, "train", killed)  # not called: it is done
    assert trained("run", store, config, parts) == folder
    other = parts.place("run", {"images": "", "index": "", "config": {}})
    assert other != folder


def test_nearness_by_hand(tmp_path: Path) -> None:
    """Two images 0 and 255 everywhere: distances are those of grey levels times the square root of D."""
    pixels = torch.tensor([0, 255]).byte()[:, None, None, None].expand(2, 1, 2, 2)
    store = store_of(pixels, tmp_path)
    queries = torch.tensor([-1.0, -0.75, 0.25])[:, None, None, None].expand(3, 1, 2, 2)
    found = nearness(store, queries, flip=False, memory=1 << 24)
    assert found["distances"] == pytest.approx([0, 0.5, 1.5])
    assert found["nearest"] == [0, 0, 1]
    assert found["quantiles"]["p50"] == pytest.approx(0.5)
    assert found["memorised"]["memorised"] == 2  # 0 of 4, .5 of 3.5; 1.5 of 2.5 is more than a third


def settings_of_capacity(**more: object) -> CapacitySettings:
    few = {"pairs": 2, "samples": 3, "sample_steps": 2, "shown": 2, "counts": (3, 9, 99)}
    return CapacitySettings(**TINY, **few | more)


def test_capacity_from_images_to_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = index_of(tmp_path)
    inputs = Inputs(out=tmp_path / "out", index=index.folder)
    document = CAPACITY.run(settings_of_capacity(), inputs)
    assert document.missing == ("99 images: the index holds 13",)
    found = document.results["networks"]
    assert [network["count"] for network in found] == [3, 9]
    assert all(len(network["error"]["mean_squared"]) == len(network["error"]["times"]) for network in found)
    assert found[0]["null"]["memorised"]["images"] == found[1]["null"]["memorised"]["images"] == 4
    for name in CAPACITY.draw(Document.open(tmp_path / "out" / "capacity.json"), tmp_path / "out"):
        assert name.stat().st_size > 10_000
    assert "n = 9 (seed 0)" in CAPACITY.caption(document)
    monkeypatch.setattr(networks, "train", None)  # everything is there
    assert CAPACITY.run(settings_of_capacity(), inputs).results == document.results


def test_capacity_is_the_error_of_the_network_on_its_own_images(tmp_path: Path) -> None:
    """Against the oracle over the subset: not over the whole index, and of the averaged weights."""
    index = index_of(tmp_path)
    out = tmp_path / "out"
    document = CAPACITY.run(settings_of_capacity(counts=(3,)), Inputs(out=out, index=index.folder))
    parts = Parts(out / "parts" / "capacity", {"experiment": "capacity", "version": 1})
    store = subset(index.store, 3, 0, parts)
    learned = LearnedVelocity.open(next(parts.folder.glob("run-3-seed-0-*")))
    error = document.results["networks"][0]["error"]
    x0, x1, _ = draw_pairs(store, 2, seed=0, rows=slice(0, 2))
    for t in (0.3, 0.9):
        xt = (1 - t) * x0 + t * x1
        wanted = oracle(all_images(store), xt, torch.full((2,), t))
        found = error["mean_squared"][error["times"].index(t)]
        assert found == pytest.approx(float((learned(xt, t) - wanted).square().mean()), rel=1e-4)


def test_tau_leads_from_the_network_to_the_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(tmp_path)
    other = index_of(tmp_path / "other", 7, first=30).store
    inputs = Inputs(out=tmp_path / "out", index=index.folder, run=tmp_path, held_out=other.folder)
    learned = EmpiricalVelocity.exact(other)
    learned.config, learned.classes = None, 0  # type: ignore[attr-defined]
    inputs.__dict__.update(learned=learned, run_fingerprint="none")
    monkeypatch.setattr(Inputs, "facts", lambda _: {"index": {"shape": [13, 3, 4, 4]}, "run": {}})
    settings = TauSettings(taus=(0.3,), samples=6, steps=40, shown=2)
    document = TAU.run(settings, inputs)
    own, between, memorised = document.results["switches"]
    assert [at["tau"] for at in (own, between, memorised)] == [0, 0.3, 1]
    assert own["from_own"] == memorised["from_memorised"] == 0
    assert own["own"]["fraction"] == memorised["same"]["fraction"] == 1
    assert memorised["own"]["fraction"] == 0
    assert memorised["near"]["memorised"]["fraction"] == 1
    assert max(memorised["near"]["distances"]) < 1e-5
    assert own["from_memorised"] == memorised["from_own"] > 1
    images = sample(HybridVelocity(inputs.field(), learned, 0.3), noise_of(range(6), (3, 4, 4)), 40)
    wanted = nearness(index.store, images, flip=inputs.flip, memory=1 << 24)
    assert between["near"]["distances"] == pytest.approx(wanted["distances"], abs=0.05)
    assert document.results["null"]["near"]["memorised"]["images"] == 7
    for path in TAU.draw(document, tmp_path / "out"):
        assert path.exists()
    with Image.open(tmp_path / "out" / "tau.png") as page:
        assert np.asarray(page).std() > 10
    assert "memorised, by tau: 0: " in TAU.caption(document)


def test_what_tau_lacks_is_said(tmp_path: Path) -> None:
    index = index_of(tmp_path)
    inputs = Inputs(out=tmp_path / "out", index=index.folder)
    with pytest.raises(InputError, match="--run was not named"):
        TAU.run(TauSettings(), inputs)
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises((CheckpointError, InputError), match=r"no trained network|no run"):
        TAU.run(TauSettings(), replace(inputs, run=run))
    other = index_of(tmp_path / "other", 7, first=30).store
    train(other, tmp_path / "run2", TrainingSettings(**TINY | {"steps": 1}).training("cfm", 0))
    with pytest.raises(InputError, match="trained on other images"):
        TAU.run(TauSettings(), replace(inputs, run=tmp_path / "run2"))
