"""What `targets` compares its networks by, and what several seeds of them say together."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nnflow.classifier import CONFIG, Classifier
from nnflow.classifying import ClassifierConfig, train_classifier
from nnflow.features import FeatureExtractor, PrincipalCoordinates
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.paired import difference


def extractors(inputs: Inputs, parts: Parts, *, steps: int) -> tuple[dict[str, FeatureExtractor], list[str]]:
    """PCA coordinates of the index, and a classifier of its labels; and what is missing for these.

    Args:
        inputs: what was named.
        parts: where the classifier is kept.
        steps: of its training; 0 for none.
    """
    found: dict[str, FeatureExtractor] = {}
    missing = []
    if inputs.opened.manifest["rank"] == "pixels":
        missing.append("the index has no PCA coordinates: no pca features; build it with --rank")
    else:
        found["pca"] = PrincipalCoordinates.leading(inputs.opened.embedding)
    if steps and len(inputs.store.classes) < 2:
        missing.append("the images have no labels: no classifier features; index a folder per class")
    elif steps:
        found["classifier"] = _classifier(inputs, parts, steps)
    if inputs.held_out is None:
        missing.append("--held-out was not named: samples are compared with training images only")
    return found, missing


def _classifier(inputs: Inputs, parts: Parts, steps: int) -> Classifier:
    """Trained on the labels of the index, once."""
    folder = parts.place("classifier", {"images": inputs.store.fingerprint, "steps": steps})
    if not (folder / CONFIG).exists():
        config = ClassifierConfig(steps=steps)
        train_classifier(inputs.store, folder, config, device=inputs.where, progress=inputs.progress)
    return Classifier.open(folder, device=inputs.where)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The networks of one target.

    Attributes:
        name: of the target.
        networks: what was measured of each seed's.
        noise: `noise.TargetNoise` of each seed, as a dict.
    """

    name: str
    networks: list[dict[str, Any]]
    noise: list[dict[str, Any]]


def joined(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """For each target what its seeds' networks are, and their differences to those of the first target.

    Returns:
        name; the steps all have; `frechet` by extractor and reference, a row per step with a value per seed;
        `memorised` per seed; `error` and `held_out_error`, a row per time; `noise`, likewise; `samples` of
        the first seed; `differences` at the last step.
    """
    first, steps = found[0], _common_steps(found)
    return [
        {
            "name": target.name,
            "steps": steps,
            "frechet": _frechet(target.networks, steps),
            "memorised": [network["memorised"] for network in target.networks],
            **{what: _errors(target.networks, what) for what in ("error", "held_out_error")},
            "noise": _noise(target.noise),
            "samples": target.networks[0]["samples"],
            "differences": _differences(target, first),
        }
        for target in found
    ]


def _common_steps(found: Sequence[Compared]) -> list[int]:
    """Those at which every network was measured."""
    measured = [{point["step"] for point in network["points"]} for one in found for network in one.networks]
    return sorted(set.intersection(*measured))


def _frechet(networks: list[dict[str, Any]], steps: list[int]) -> dict[str, dict[str, list[list[float]]]]:
    points = [{point["step"]: point["frechet"] for point in network["points"]} for network in networks]
    return {
        called: {
            reference: [[of[step][called][reference]["value"] for of in points] for step in steps]
            for reference in references
        }
        for called, references in points[0][steps[-1]].items()
    }


def _errors(networks: list[dict[str, Any]], what: str) -> dict[str, Any] | None:
    if networks[0][what] is None:
        return None
    rows = zip(*(network[what]["mean_squared"] for network in networks), strict=True)
    return {"times": networks[0][what]["times"], "mean_squared": [list(row) for row in rows]}


def _noise(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"times": seeds[0]["times"]}
    for what in ("target", "gradient_target", "gradient", "loss"):
        if seeds[0][what] is None:
            found[what] = None
        else:
            found[what] = [list(row) for row in zip(*(seed[what] for seed in seeds), strict=True)]
    return found


def _differences(target: Compared, first: Compared) -> list[dict[str, Any]]:
    """Of the last Frechet distances to those of the first target, seed by seed."""
    if target is first or len(target.networks) < 2:
        return []
    last = target.networks[0]["points"][-1]["frechet"]
    found = []
    for called in last:
        for reference in last[called]:
            value = _last(called, reference)
            ours, theirs = map(value, target.networks), map(value, first.networks)
            told = {"target": target.name, "extractor": called, "reference": reference}
            found.append(told | asdict(difference(list(ours), list(theirs))))
    return found


def _last(called: str, reference: str) -> Callable[[dict[str, Any]], float]:
    def value(network: dict[str, Any]) -> float:
        return float(network["points"][-1]["frechet"][called][reference]["value"])

    return value
