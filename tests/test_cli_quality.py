"""nnflow classifier and evaluate --features: from images to evaluation.json, refusals in one line."""

import json

import numpy as np
import pytest
from refusals import refused
from stores import stripes

from nnflow.cli import main
from nnflow.errors import InputError
from nnflow.features import Pixels
from nnflow.index import NeighbourIndex
from nnflow.quality import image_quality
from nnflow.store import ImageStore, to_float


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """train/out, an index of 60 images in two classes; held/out, of 40 others; a file of 30 samples."""
    home = tmp_path_factory.mktemp("home")
    store = stripes(60, home / "train", 0)
    NeighbourIndex.build(store, store.folder, rank=6)
    held = stripes(40, home / "held", 1)
    (home / "samples").mkdir()
    np.save(home / "samples" / "samples-learned.npy", to_float(held.pixels[:30]).reshape(30, 1, 8, 8) * 0.5)
    return home


def test_from_images_to_figures(home, run, tmp_path):
    train, held = home / "train" / "out", home / "held" / "out"
    code, out, _ = run(
        "classifier", home / "train" / "out", "--out", tmp_path / "net", "--steps", 30, "--held-out", held
    )
    assert code == 0
    assert "of 40 held-out images right (95 % interval" in out

    samples = home / "samples" / "samples-learned.npy"
    names = ["pixels", "pca:5", f"classifier:{tmp_path / 'net'}"]
    code, out, _ = run(
        "evaluate", "--index", home / "train" / "out", "--samples", samples, "--held-out", held, "--seed", 3,
        *[word for name in names for word in ("--features", name)], "--out", tmp_path / "e",
    )  # fmt: skip
    assert code == 0
    report = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert report["config"]["features"] == names
    assert [q["extractor"]["features"] for q in report["quality"]] == [64, 5, 128]
    assert report["quality"][1]["extractor"]["name"] == "pca"
    assert report["quality"][2]["extractor"]["trained_on"] == ImageStore.open(train).fingerprint
    wanted = image_quality(
        Pixels((1, 8, 8)),
        ImageStore.open(train),
        samples=to_float(ImageStore.open(held).pixels[:30]).reshape(30, 1, 8, 8) * 0.5,
        held_out=ImageStore.open(held),
        seed=3,
    )
    pixels = report["quality"][0]
    for name in ("to_training", "to_held_out", "null"):
        found, known = pixels[name], getattr(wanted, name)
        assert found["frechet"]["value"] == pytest.approx(known.frechet.value, rel=1e-9)
        assert found["kernel"]["value"] == pytest.approx(known.kernel.value, rel=1e-9)
        assert found["precision_recall"]["precision"] == known.precision_recall.precision
        assert found["frechet"]["count"] == 30
    assert pixels["seed"] == 3
    assert "pixels (64 features), 30 samples against training images: Frechet" in out
    assert "classifier (128 features), 30 held-out against training images: Frechet" in out


def test_without_features_there_are_none(home, run, tmp_path):
    code, _, _ = run(
        "evaluate", "--index", home / "train" / "out", "--held-out", home / "held" / "out", "--out", tmp_path
    )
    assert code == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["quality"] == []


@pytest.mark.parametrize(
    ("features", "said"),
    [
        ("inception", "wanted pixels, pca, pca:64, classifier:DIR or torchscript:FILE"),
        ("pca:many", "features pca:many"),
        ("pca:900", "900 PCA coordinates"),
        ("classifier:", "features classifier:"),
        ("classifier:nowhere", "nnflow classifier wrote"),
        ("torchscript:nowhere.pt", "wanted a TorchScript file"),
    ],
)
def test_features_that_are_not_there(home, run, tmp_path, features, said):
    code, _, err = run(
        "evaluate", "--index", home / "train" / "out", "--held-out", home / "held" / "out",
        "--features", features, "--out", tmp_path / "x",
    )  # fmt: skip
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_features_of_nothing(home, run, tmp_path):
    code, _, err = run(
        "evaluate",
        "--index",
        home / "train" / "out",
        "--run",
        home,
        "--features",
        "pixels",
        "--out",
        tmp_path / "x",
    )
    assert code == 2
    assert "--features compares images" in err
    with refused(InputError, "nothing to compare"):
        image_quality(Pixels((1, 8, 8)), ImageStore.open(home / "train" / "out"))
