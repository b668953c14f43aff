"""`tau`: samples of one noise each by u* until tau and by the network from then on, tau = 0 ... 1.

At tau = 0 a sample is the network's own, at tau = 1 a training image. Between, it says until when u* may lead
without taking away what the network would have made: when generalisation is decided. Images are compared in
the 8 bits they are stored in.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.config import knob
from nnflow.features import FeatureExtractor, Scripted, feature_blocks
from nnflow.figures.drawn.tau import draw
from nnflow.figures.experiment import Document, Experiment, Settings, facts
from nnflow.figures.inputs import Inputs
from nnflow.figures.networks import nearness, nearness_key
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import from_text, to_text
from nnflow.imageset import ImageSet
from nnflow.metrics import wilson_interval
from nnflow.sampling import noise_of, sample
from nnflow.velocity import HybridVelocity

_TENTHS = tuple(i / 10 for i in range(11))


@dataclass(frozen=True, kw_only=True)
class TauSettings(Settings):
    """Switches, samples and how they are compared."""

    taus: tuple[float, ...] = knob(_TENTHS, "times of the switch; 0 and 1 are added", low=0, high=1)
    samples: int = knob(64, "samples at each tau, of noise seeds 0, 1, ...", low=2)
    steps: int = knob(50, "Euler steps of a sample", low=1)
    features: str = knob("", "TorchScript file of a network (DINOv2, LPIPS' trunk) to measure distances in")
    unseen: int = knob(1_000, "images taken of --held-out for the null", low=2)
    shown: int = knob(8, "noise seeds in the picture", low=1, high=24)


@dataclass(frozen=True, kw_only=True)
class Tau:
    """What became of the samples.

    Attributes:
        switches: for each tau: `near` of `networks.nearness`; `from_own` and `from_memorised`, median L2
            distances to the sample at tau = 0 and at tau = 1; `own`, the share nearer to the former;
            `same`, the share whose nearest training image is that of tau = 1; features; pictures.
        null: `near` of held-out images, and features.
        missing: what was not named.
    """

    switches: tuple[dict[str, Any], ...]
    null: dict[str, Any] | None
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Switches and null."""
        return {"switches": list(self.switches), "null": self.null}


def measure(settings: TauSettings, inputs: Inputs, parts: Parts) -> Tau:
    """Samples at every tau, each a part of its own, then what they are to each other."""
    extractor = Scripted.open(settings.features, device=inputs.where) if settings.features else None
    taus = sorted({0.0, 1.0, *settings.taus})
    key = inputs.field_key | {"run": inputs.run_fingerprint, "steps": settings.steps}
    key |= {"samples": settings.samples}
    key |= nearness_key(flip=inputs.flip)
    found = []
    for tau in taus:
        drawn = parts.get(f"tau-{tau:g}", key | {"tau": tau}, partial(_sampled, tau, settings, inputs))
        images = from_text(drawn["images"])
        features = _features(extractor, images, inputs, parts, key | {"tau": tau}, f"features-{tau:g}")
        found.append({"tau": tau, "drawn": drawn, "images": images, "features": features})
    switches = tuple(_switch(at, found[0], found[-1], settings.shown) for at in found)
    null, missing = _null(settings, inputs, parts, extractor)
    return Tau(switches=switches, null=null, missing=missing)


def _sampled(tau: float, settings: TauSettings, inputs: Inputs) -> dict[str, Any]:
    """The samples at one tau, and how near they are to the training images."""
    learned, flip = inputs.learned, inputs.flip
    hybrid = HybridVelocity(inputs.field(flip=flip), learned, tau)
    labels = torch.arange(settings.samples) % learned.classes if learned.classes else None
    noise = noise_of(range(settings.samples), inputs.store.shape[1:])
    images = sample(hybrid, noise, settings.steps, label=labels, progress=inputs.progress)
    texts = to_text(images)
    return {
        "images": texts,
        "near": nearness(inputs.store, from_text(texts), flip=flip, memory=inputs.memory),
    }


def _switch(at: dict[str, Any], own: dict[str, Any], memorised: dict[str, Any], shown: int) -> dict[str, Any]:
    """One tau, against tau = 0 and tau = 1."""
    from_own, from_memorised = (_apart(at["images"], end["images"]) for end in (own, memorised))
    nearer = int((from_own < from_memorised).sum())
    ids, wanted = (torch.tensor(end["drawn"]["near"]["nearest"]) for end in (at, memorised))
    return {
        "tau": at["tau"],
        "near": at["drawn"]["near"],
        "from_own": float(from_own.median()),
        "from_memorised": float(from_memorised.median()),
        "own": _proportion(nearer, len(from_own)),
        "same": _proportion(int((ids == wanted).sum()), len(ids)),
        "features": at["features"],
        "pictures": at["drawn"]["images"][:shown],
    }


def _apart(images: Tensor, others: Tensor) -> Float[Tensor, " S"]:
    """L2 distances, image by image."""
    return (images - others).flatten(1).double().norm(dim=1)


def _proportion(count: int, of: int) -> dict[str, Any]:
    low, high = wilson_interval(count, of)
    return {"fraction": count / of, "low": low, "high": high, "count": count, "of": of}


def _null(
    settings: TauSettings, inputs: Inputs, parts: Parts, extractor: FeatureExtractor | None
) -> tuple[dict[str, Any] | None, tuple[str, ...]]:
    if inputs.held_out is None:
        return None, ("--held-out was not named: no null of the memorised fraction",)
    held_out = inputs.held_out_store
    ids = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))[: settings.unseen]
    images = held_out.images(ids)
    key = {"images": inputs.store.fingerprint, "held_out": held_out.fingerprint, "unseen": settings.unseen}
    key |= nearness_key(flip=inputs.flip)

    def near() -> dict[str, Any]:
        return nearness(inputs.store, images, flip=inputs.flip, memory=inputs.memory)

    features = _features(extractor, images, inputs, parts, key, "features-null")
    return {"near": parts.get("null", key, near), "features": features}, ()


def _features(
    extractor: FeatureExtractor | None,
    images: Tensor,
    inputs: Inputs,
    parts: Parts,
    key: dict[str, Any],
    name: str,
) -> dict[str, Any] | None:
    """Distances of features to those of the nearest training image, in the same features."""
    if extractor is None:
        return None

    def found() -> dict[str, Any]:
        ours = _all_features(extractor, images, inputs)
        nearest = torch.full((len(ours),), torch.inf, dtype=torch.float64)
        for block in feature_blocks(
            extractor, inputs.store, torch.arange(len(inputs.store)), memory=inputs.memory
        ):
            nearest = torch.minimum(nearest, torch.cdist(ours, block.double()).amin(1))
        return {"median": float(nearest.median()), "distances": nearest.tolist()}

    return parts.get(name, key | {"extractor": extractor.identity}, found)


def _all_features(extractor: FeatureExtractor, images: ImageSet, inputs: Inputs) -> Float[Tensor, "S F"]:
    ids = torch.arange(len(images))
    return torch.cat(list(feature_blocks(extractor, images, ids, memory=inputs.memory))).double()


def caption(document: Document) -> str:
    """What is seen, the two regimes, and what it was made of."""
    settings, results = document.settings, document.results
    run = document.provenance["inputs"]["run"]
    trained = f"{run['step']:,} steps of training" if "step" in run else "a network of unknown training"
    told = [
        f"{settings['samples']} samples of noise seeds 0 to {settings['samples'] - 1} at each tau: u* on "
        f"[0, tau], the network ({trained}) from then on, {settings['steps']} Euler steps."
    ]
    for share, what in (
        (lambda at: at["own"], "nearer to the network's own sample than to u*'s"),
        (lambda at: at["same"], "with the same nearest training image as u*'s sample"),
        (lambda at: at["near"]["memorised"], "memorised"),
    ):
        shares = ", ".join(f"{at['tau']:g}: {100 * share(at)['fraction']:.0f}" for at in results["switches"])
        told.append(f"Share (%) {what}, by tau: {shares}.")
    widest = max(at["own"]["high"] - at["own"]["low"] for at in results["switches"])
    if results["null"] is not None:
        null = results["null"]["near"]["memorised"]
        told.append(f"Of {null['images']:,} held-out images {_percent(null)} count as memorised, the null.")
    return " ".join([*told, f"Wilson's 95 % intervals are up to {100 * widest:.0f} % wide.", facts(document)])


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['fraction']:.0f} % ({100 * found['low']:.0f} to {100 * found['high']:.0f} %)"


EXPERIMENT = Experiment(
    name="tau",
    title="When generalisation is decided: u* until tau, the network from then on",
    about="Samples of fixed noise by u* on [0, tau] and u_theta after it, for tau from 0 to 1.",
    claim=(
        "On CIFAR-10 the samples stay what the network makes of the noise up to tau = 0.2; from tau = 0.4 on "
        "they are training images."
    ),
    settings=TauSettings,
    needs=("index", "run"),
    takes=("held_out",),
    measure=measure,
    draw=draw,
    caption=caption,
)
