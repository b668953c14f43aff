"""The classifier learns, is the same every time, and comes back from disk as it was or not at all."""

import json

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from stores import store_of, striped, stripes

from nnflow.classifier import Classifier, Network, accuracy
from nnflow.classifying import ClassifierConfig, train_classifier
from nnflow.errors import CheckpointError, InputError

CONFIG = ClassifierConfig(steps=60, batch=32, seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stripes(300, tmp_path_factory.mktemp("train"), 0)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    return stripes(100, tmp_path_factory.mktemp("held-out"), 1)


@pytest.fixture(scope="module")
def trained(store, held_out, tmp_path_factory):
    return train_classifier(store, tmp_path_factory.mktemp("run") / "net", CONFIG, held_out=held_out)


def test_it_tells_unseen_rows_from_columns(trained, held_out):
    assert trained.held_out.fraction > 0.95
    assert trained.held_out.images == 100
    opened = Classifier.open(trained.folder)
    images = held_out.images(torch.arange(100))
    right = int((opened.logits(images).argmax(1) == held_out.labels).sum())
    assert trained.held_out == accuracy(opened, held_out, memory=2 * 7 * opened.bytes_per_image)
    assert right == trained.held_out.correct
    saved = json.loads((trained.folder / "config.json").read_text())
    assert saved["held_out"]["accuracy"]["correct"] == right
    assert saved["held_out"]["images"] == held_out.fingerprint


def test_features_are_what_the_last_layer_is_given(trained, store):
    opened = Classifier.open(trained.folder)
    images = store.images(torch.arange(20))
    features, weights = opened(images), load_file(trained.folder / "weights.safetensors")
    assert features.shape == (20, 128)
    logits = features @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(opened.logits(images), logits)
    assert float(features.min()) >= 0  # after the rectifier, as Inception's are
    torch.testing.assert_close(opened(images[3:4]), features[3:4])  # of the image alone, not of its batch


def test_the_seed_decides_every_weight(trained, store, tmp_path):
    torch.rand(3)  # the caller's random numbers have no part in it
    again = train_classifier(store, tmp_path / "again", CONFIG)
    other = train_classifier(store, tmp_path / "other", ClassifierConfig(steps=60, batch=32, seed=2))
    one, two, three = (load_file(run.folder / "weights.safetensors") for run in (trained, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["head.weight"], three["head.weight"])
    names = [Classifier.open(run.folder).identity for run in (trained, again, other)]
    assert names[0] == names[1] != names[2]
    assert names[0]["trained_on"] == store.fingerprint
    assert again.held_out is None


def test_flips_are_made_when_asked_for(store, tmp_path, monkeypatch):
    """Images that brighten from left to right: half of a batch then darkens."""
    rising = torch.arange(8, dtype=torch.float32).expand(1, 8, 8) / 8
    seen, usual = [], Network.forward
    monkeypatch.setattr(Network, "forward", lambda self, x: seen.append(x) or usual(self, x))
    monkeypatch.setattr(type(store), "images", lambda self, ids: rising.expand(len(ids), 1, 8, 8))
    for flip in (True, False):
        seen.clear()
        train_classifier(store, tmp_path / str(flip), ClassifierConfig(steps=1, batch=100, flip=flip))
        share = float((seen[0][:, 0, 0, 0] > seen[0][:, 0, 0, 7]).float().mean())
        assert 0.3 < share < 0.7 if flip else share == 0


@pytest.mark.parametrize("size", [5, 70])
def test_sizes_from_tiny_to_averaged(size, tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, size, size), dtype=torch.uint8, generator=generator)
    some = store_of(images, tmp_path / "in", classes=["a"] * 3 + ["b"] * 3)
    run = train_classifier(some, tmp_path / "net", ClassifierConfig(steps=2, batch=4))
    opened = Classifier.open(run.folder)
    assert opened(some.images(torch.arange(6))).shape == (6, 128)
    if size > 64:
        shrunk = torch.nn.functional.adaptive_avg_pool2d(some.images(torch.arange(6)), 64)
        torch.testing.assert_close(opened(some.images(torch.arange(6))), opened.network.features(shrunk))


# ----- bad input


def test_a_damaged_folder_is_refused(trained, tmp_path):
    weights = (trained.folder / "weights.safetensors").read_bytes()
    config = (trained.folder / "config.json").read_text()

    def opened(weights, config):
        (tmp_path / "weights.safetensors").write_bytes(weights)
        (tmp_path / "config.json").write_text(config)
        return Classifier.open(tmp_path)

    assert opened(weights, config).classes == ("column", "row")
    with refused(CheckpointError, "not the weights"):
        opened(weights[:-1] + bytes([weights[-1] ^ 1]), config)
    with refused(CheckpointError, "not of an nnflow classifier"):
        opened(weights, config.replace("nnflow classifier", "nnflow run"))
    with refused(CheckpointError, "lacks 'shape'"):
        opened(weights, config.replace('"shape"', '"form"'))
    with refused(CheckpointError, "of another network"):
        opened(weights, config.replace('"row"', '"row", "third"'))
    (tmp_path / "weights.safetensors").unlink()
    with refused(CheckpointError, "no such file"):
        Classifier.open(tmp_path)
    with refused(CheckpointError, "no such file.*nnflow classifier wrote"):
        Classifier.open(tmp_path / "absent")


def test_images_it_cannot_be_trained_or_asked_on(trained, store, held_out, tmp_path):
    with refused(CheckpointError, "already"):
        train_classifier(store, trained.folder, CONFIG)
    with refused(InputError, "0 classes"):
        train_classifier(store_of(striped(4, 0), tmp_path / "plain"), tmp_path / "x", CONFIG)
    other = stripes(4, tmp_path / "other", 0, names=("a", "b"))
    with refused(InputError, "same classes"):
        train_classifier(store, tmp_path / "x", CONFIG, held_out=other)
    with refused(InputError, "same classes"):
        accuracy(Classifier.open(trained.folder), other)
    with refused(InputError, r"\(3, 8, 8\).*\(1, 8, 8\)"):
        Classifier.open(trained.folder)(torch.zeros(2, 3, 8, 8))
    with refused(InputError, "steps 0"):
        ClassifierConfig(steps=0)
    with refused(InputError, "no longer finite"):
        train_classifier(store, tmp_path / "x", ClassifierConfig(steps=20, batch=8, learning_rate=1e30))
