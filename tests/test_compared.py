"""Targets side by side: what their seeds say together, by hand, and one small study from end to end."""

from pathlib import Path

import pytest
from contract import pixels_of
from stores import store_of

from nnflow.errors import InputError
from nnflow.figures import networks
from nnflow.figures.compared import Compared, extractors, joined
from nnflow.figures.experiment import Document
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.figures.targets import EXPERIMENT as TARGETS
from nnflow.figures.targets import TargetSettings
from nnflow.index import NeighbourIndex

TINY = {"preset": "digits", "channels": (8,), "head_dim": 8, "attention": (2,), "batch": 4, "steps": 2}


def network(*frechet: float, error: float = 1.0) -> dict:
    points = [
        {"step": 5 * row + 5, "frechet": {"pca": {"training": {"value": v}, "held-out": {"value": 10 * v}}}}
        for row, v in enumerate(frechet)
    ]
    errors = {"times": [0.5], "mean_squared": [error]}
    return {"points": points, "memorised": {}, "error": errors, "held_out_error": None, "samples": ["x"]}


def noise(value: float, *, known: bool = True) -> dict:
    there = [value] if known else None
    return {
        "times": [0.5],
        "target": there,
        "gradient_target": there,
        "gradient": [2 * value],
        "loss": [value],
    }


def test_seeds_are_joined_and_differences_paired() -> None:
    found = joined(
        [
            Compared(
                name="cfm", networks=[network(4.0, 2.0), network(5.0, 3.0)], noise=[noise(1.0), noise(3.0)]
            ),
            Compared(
                name="otcfm",
                networks=[network(6.0, 1.5, error=2.0), network(7.0, 2.0, error=4.0)],
                noise=[noise(1.0, known=False), noise(3.0, known=False)],
            ),
        ]
    )
    assert found[0]["steps"] == [5, 10]
    assert found[0]["frechet"]["pca"] == {"training": [[4, 5], [2, 3]], "held-out": [[40, 50], [20, 30]]}
    assert found[0]["differences"] == []
    assert found[0]["noise"]["gradient"] == [[2, 6]]
    assert found[1]["noise"]["target"] is None
    assert found[1]["error"]["mean_squared"] == [[2, 4]]
    training, held_out = found[1]["differences"]
    assert training["values"] == (-0.5, -1.0)
    assert training["mean"] == -0.75
    assert held_out["mean"] == -7.5
    half = 12.7062 * (0.125**0.5) / 2**0.5  # Student's quantile of one degree of freedom
    assert (training["low"], training["high"]) == pytest.approx((-0.75 - half, -0.75 + half), rel=1e-4)


def test_a_step_that_one_network_lacks_is_left_out() -> None:
    """An interrupted training may have lost a checkpoint."""
    short = network(5.0, 3.0, 1.0)
    short["points"] = short["points"][1:]
    found = joined(
        [Compared(name="cfm", networks=[network(4.0, 2.0, 1.5), short], noise=[noise(1.0), noise(3.0)])]
    )
    assert found[0]["steps"] == [10, 15]
    assert found[0]["frechet"]["pca"]["training"] == [[2, 3], [1.5, 1]]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    store = store_of(pixels_of(26), tmp_path, classes=["a"] * 12 + ["b"] * 14)
    index = NeighbourIndex.build(store, store.folder, rank=4)
    held_out = store_of(pixels_of(50)[26:], tmp_path / "held", classes=["a"] * 12 + ["b"] * 12)
    return Inputs(out=tmp_path / "out", index=index.folder, held_out=held_out.folder)


def settings(**more: object) -> TargetSettings:
    few = {
        "targets": "cfm,otcfm",
        "seeds": (0, 1),
        "points": 2,
        "samples": 20,
        "sample_steps": 2,
        "classifier_steps": 3,
        "pairs": 2,
        "noise_batch": 2,
        "noise_draws": 2,
        "noise_batches": 2,
        "times": (0.5,),
        "shown": 2,
    }
    return TargetSettings(**TINY, **few | more)


def test_targets_from_images_to_pictures(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    document = TARGETS.run(settings(), inputs)
    assert document.missing == ()
    found = document.results["targets"]
    assert [target["name"] for target in found] == ["cfm", "otcfm"]
    assert found[0]["steps"] == [1, 2]
    assert set(found[0]["frechet"]) == {"pca", "classifier"}
    for target in found:
        assert len(target["frechet"]["pca"]["held-out"]) == 2
        assert len(target["frechet"]["pca"]["held-out"][0]) == 2
    # one seed, one start, the same batches: after 1 step they have hardly parted, two seeds have
    first, second = found[0]["frechet"]["pca"]["training"][0], found[1]["frechet"]["pca"]["training"][0]
    assert abs(first[0] - second[0]) < abs(first[0] - first[1])
    assert document.results["null"]["pca"]["count"] == 20
    names = [path.name for path in TARGETS.draw(Document.open(inputs.out / "targets.json"), inputs.out)]
    assert names[0] == "targets.png"
    assert {"targets-differences.png", "targets-noise.png", "targets-samples.png"} < set(names)
    assert "otcfm, pca to held-out" in TARGETS.caption(document)
    monkeypatch.setattr(networks, "train", None)  # everything is there
    assert TARGETS.run(settings(), inputs).results == document.results


def test_wrong_names_are_told_before_any_training(inputs: Inputs) -> None:
    for wrong, message in (
        ("cfm,ddpm", "target 'ddpm': wanted some of cfm"),
        ("efm-m", "target 'efm-m'"),
        ("efm-0", "target 'efm-0'"),
        ("cfm,cfm", "each once"),
        (" , ", "wanted names"),
    ):
        with pytest.raises(InputError, match=message):
            TARGETS.run(settings(targets=wrong), inputs)
    assert not list((inputs.out / "parts" / "targets").glob("run-*"))


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    store = store_of(pixels_of(13), tmp_path)
    index = NeighbourIndex.build(store, store.folder, rank="pixels")
    inputs = Inputs(out=tmp_path / "out", index=index.folder)
    found, missing = extractors(inputs, Parts(tmp_path / "parts", {}), steps=3)
    assert found == {}
    assert [line.partition(":")[0] for line in missing] == [
        "the index has no PCA coordinates",
        "the images have no labels",
        "--held-out was not named",
    ]
