"""`capacity`: how far networks are from u*, over t, when they are trained on more and more images.

    |u_theta(x_t, t) - u*(x_t, t)|^2 / D,   u* of the images that the network was trained on          (1)

on its paths to training images and to images it has not seen. A network of few images can be u*, and then its
samples are those images; one of many cannot. How near samples lie says which, against the null: how near
unseen images lie to the same training images. The subsets are nested.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nnflow.config import TrainConfig, knob
from nnflow.evaluation import evaluate
from nnflow.figures.drawn.capacity import draw
from nnflow.figures.experiment import Document, Experiment, facts
from nnflow.figures.inputs import Inputs, weights_fingerprint
from nnflow.figures.networks import TrainingSettings, nearness, nearness_key, subset, trained, unseen
from nnflow.figures.parts import Parts
from nnflow.figures.pictures import to_text
from nnflow.sampling import sample
from nnflow.store import ImageStore
from nnflow.unet import LearnedVelocity
from nnflow.velocity import EmpiricalVelocity

_TARGETS = ("cfm", "otcfm", "efm")  # those that need no index of each subset


@dataclass(frozen=True, kw_only=True)
class CapacitySettings(TrainingSettings):
    """Numbers of images, seeds, and what is measured of each network."""

    counts: tuple[int, ...] = knob((10, 100, 1_000, 10_000), "images trained on", low=2)
    seeds: tuple[int, ...] = knob((0,), "of the networks; one each for every number of images", low=0)
    target: str = knob("cfm", "what the networks regress on", choices=_TARGETS)
    draw: int = knob(0, "seed of the images taken", low=0)
    pairs: int = knob(256, "pairs of noise and image, for the error", low=1)
    samples: int = knob(256, "samples of each network, of noise seeds 0, 1, ...", low=1)
    sample_steps: int = knob(50, "Euler steps of a sample", low=1)
    unseen: int = knob(1_000, "images not trained on, taken of the index where no --held-out is named", low=2)
    shown: int = knob(8, "samples in the picture", low=1, high=16)


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """One entry per network, from few images to many.

    Attributes:
        networks: count, seed, step, parameters, `error` and `held_out_error` of `evaluation`, `near` and
            `null` of `networks.nearness`, and pictures.
        missing: numbers of images that the index has not.
    """

    networks: tuple[dict[str, Any], ...]
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The networks."""
        return {"networks": list(self.networks)}


def measure(settings: CapacitySettings, inputs: Inputs, parts: Parts) -> Capacity:
    """Trains a network on each subset, and measures it."""
    held = len(inputs.store)
    counts = sorted(set(settings.counts))
    missing = [f"{n:,} images: the index holds {held:,}" for n in counts if n > held]
    fitting = [n for n in counts if n <= held]
    found = []
    for count in fitting:
        store = subset(inputs.store, count, settings.draw, parts)
        others, about = unseen(inputs, fitting[-1], settings.draw, at_most=settings.unseen)
        if others is None and count == fitting[-1]:
            missing.append("no image of the index is left unseen: name --held-out for the null")
        for seed in settings.seeds:
            config = settings.training(settings.target, seed)
            run = trained(f"run-{count}-seed-{seed}", store, config, parts, progress=inputs.progress)
            asked = {name: getattr(settings, name) for name in ("pairs", "samples", "sample_steps", "shown")}
            key = {"weights": weights_fingerprint(run), "images": store.fingerprint, "unseen": about, **asked}
            key |= nearness_key(flip=config.flip)
            measured = partial(_measured, settings, inputs, store, others, LearnedVelocity.open(run), config)
            value = parts.get(f"network-{count}-seed-{seed}", key, measured)
            found.append({"count": count, "seed": seed, "step": config.steps, **value})
    return Capacity(networks=tuple(found), missing=tuple(missing))


def _measured(
    settings: CapacitySettings,
    inputs: Inputs,
    store: ImageStore,
    others: ImageStore | Tensor | None,
    learned: LearnedVelocity,
    config: TrainConfig,
) -> dict[str, Any]:
    """Everything about one network."""
    learned = learned.to(inputs.where)
    field = EmpiricalVelocity.exact(store, flip=config.flip, memory=inputs.memory, device=inputs.where)
    found = evaluate(
        store,
        held_out=others,
        learned=learned,
        field=field,
        pairs=settings.pairs,
        memory=inputs.memory,
        progress=inputs.progress,
    ).to_dict()
    images = sample(learned, list(range(settings.samples)), settings.sample_steps, progress=inputs.progress)
    near = nearness(store, images, flip=config.flip, memory=inputs.memory)
    shown = slice(0, settings.shown)
    return {
        "parameters": sum(weight.numel() for weight in learned.parameters()),
        "error": found["error"],
        "held_out_error": found["held_out_error"],
        "near": near,
        "null": None if others is None else nearness(store, others, flip=config.flip, memory=inputs.memory),
        "samples": to_text(images[shown]),
        "nearest": to_text(_nearest(store, near, shown)),
    }


def _nearest(store: ImageStore, near: dict[str, Any], shown: slice) -> Tensor:
    """The training images nearest to the samples shown, mirrored where these are so."""
    images, mirrored = (
        store.images(torch.tensor(near["nearest"][shown])),
        torch.tensor(near["mirrored"][shown]),
    )
    images[mirrored] = images[mirrored].flip(-1)
    return images


def caption(document: Document) -> str:
    """What is seen, a sentence for each network, and what it was made of."""
    settings, networks = document.settings, document.results["networks"]
    about = (
        f"Networks of {networks[0]['parameters']:,} parameters, target {settings['target']}, "
        f"{networks[0]['step']:,} steps each, training seed {', '.join(map(str, settings['seeds']))}, "
        f"on nested subsets (drawn by seed {settings['draw']}). Error on {settings['pairs']:,} pairs at "
        f"each time, per value of an image; {settings['samples']:,} samples of each in "
        f"{settings['sample_steps']} Euler steps. Intervals are Wilson's, 95 %."
    )
    return " ".join([about, *map(_in_words, networks), facts(document)])


def _in_words(network: dict[str, Any]) -> str:
    error = network["error"]
    worst, when = max(zip(error["mean_squared"], error["times"], strict=True))
    null = "" if network["null"] is None else f", of unseen images {_share(network['null'])}"
    return (
        f"n = {network['count']:,} (seed {network['seed']}): largest error on training paths {worst:.2g} at "
        f"t = {when:g}; samples memorised {_share(network['near'])}{null}."
    )


def _share(near: dict[str, Any]) -> str:
    found = near["memorised"]
    low, high = 100 * found["low"], 100 * found["high"]
    return f"{100 * found['fraction']:.1f} % ({low:.1f} to {high:.1f} %)"


EXPERIMENT = Experiment(
    name="capacity",
    title="Where networks fail to be u*: more images, more error",
    about="Error of u_theta against u* over t for networks trained on 10 ... 10,000 of the images.",
    claim=(
        "Networks of few images are close to u* and recall them; on more images the error grows, most at "
        "early times (near t = 0.15 on CIFAR-10 at 32 x 32) and at t -> 1, and samples move away from the "
        "training images."
    ),
    settings=CapacitySettings,
    needs=("index",),
    takes=("held_out",),
    measure=measure,
    draw=draw,
    caption=caption,
    trains=True,
    tolerant=False,
)
