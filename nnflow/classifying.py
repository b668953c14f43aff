"""Trains the small classifier of `classifier` on the labels of a store: momentum descent on cross-entropy.

The rate rises in a line for a fifth of the steps and falls in a line to 0. Everything random is drawn from
the seed, on the CPU; there the same seed gives the same weights.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from tqdm import tqdm

from nnflow.classifier import CONFIG, KIND, WEIGHTS, Accuracy, Classifier, Network, accuracy
from nnflow.errors import CheckpointError, InputError
from nnflow.files import disk_errors, file_mark, shown, whole_file, write_json
from nnflow.store import ImageStore

_WARM_UP = 0.2  # of the steps up to the largest rate; from there down to 0
_MOMENTUM, _DECAY = 0.9, 5e-4
_SMOOTHING = 0.1


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How a classifier is trained; by default about six minutes of one core on CIFAR-10.

    Attributes:
        steps: of stochastic gradient descent.
        batch: images per step.
        learning_rate: the largest; reached after a fifth of the steps, then falling to 0.
        flip: mirror images at random: right for photographs, wrong for digits.
        seed: of the first weights and of the batches.
    """

    steps: int = 2500
    batch: int = 128
    learning_rate: float = 0.1
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1 or not 0 < self.learning_rate < float("inf"):
            raise InputError(
                f"steps {self.steps}, batch {self.batch}, learning rate {self.learning_rate:g}: wanted at "
                "least one step of one image, and a rate above 0"
            )


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """What a training made.

    Attributes:
        folder: where it is.
        held_out: accuracy on images it was not trained on; None where none were given.
        loss: mean cross-entropy over the last tenth of the steps, in nats, labels smoothed by 0.1.
        seconds: that the training took.
    """

    folder: Path
    held_out: Accuracy | None
    loss: float
    seconds: float


def train_classifier(
    store: ImageStore,
    out: str | Path,
    config: ClassifierConfig | None = None,
    *,
    held_out: ImageStore | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> TrainedClassifier:
    """Trains a classifier on the labels of `store`; on one CPU the same seed gives the same weights.

    Args:
        store: images with at least two classes.
        out: a new folder for it.
        config: every knob.
        held_out: images of the same classes, to measure the accuracy on.
        device: to train on.
        progress: show a bar on the standard error.

    Raises:
        InputError: images without classes, held-out ones of other classes or another size, or a loss that
            is no longer finite.
        CheckpointError: `out` holds a classifier already.
        StoreError: `out` cannot be written.
    """
    place, knobs = Path(out), config or ClassifierConfig()
    _check_labels(store, held_out)
    if (place / CONFIG).exists():
        raise CheckpointError(f"{shown(place)}: a classifier is there already; name another folder")
    with disk_errors(place, "creating"):
        place.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    network, loss = _train(store, knobs, torch.device(device), progress=progress)
    seconds = time.perf_counter() - began
    weights = {
        name: t.contiguous().cpu() for name, t in network.state_dict().items() if t.is_floating_point()
    }
    with whole_file(place / WEIGHTS) as partial:
        save_file(weights, partial)
    about: dict[str, Any] = {
        "kind": KIND,
        "nnflow": version("nnflow"),
        "torch": torch.__version__,
        "images": store.fingerprint,
        "shape": list(store.shape[1:]),
        "classes": list(store.classes),
        "config": dataclasses.asdict(knobs),
        "weights": file_mark(place / WEIGHTS),
        "loss": loss,
        "seconds": seconds,
    }
    write_json(place / CONFIG, about)
    if held_out is None:
        return TrainedClassifier(folder=place, held_out=None, loss=loss, seconds=seconds)
    found = accuracy(Classifier.open(place, device=device), held_out)
    write_json(
        place / CONFIG,
        about | {"held_out": {"images": held_out.fingerprint, "accuracy": dataclasses.asdict(found)}},
    )
    return TrainedClassifier(folder=place, held_out=found, loss=loss, seconds=seconds)


def _check_labels(store: ImageStore, held_out: ImageStore | None) -> None:
    store.refuse_latents("a classifier")
    if len(store.classes) < 2:
        raise InputError(
            f"images of {len(store.classes)} classes: a classifier needs at least two; index a folder with "
            "one folder per class, or take pca features"
        )
    if held_out is not None and (held_out.classes != store.classes or held_out.shape[1:] != store.shape[1:]):
        raise InputError(
            f"held-out images of {len(held_out.classes)} classes, {tuple(held_out.shape[1:])}, and training "
            f"images of {len(store.classes)}, {tuple(store.shape[1:])}: wanted the same classes and size"
        )


def _train(
    store: ImageStore, config: ClassifierConfig, device: torch.device, *, progress: bool
) -> tuple[Network, float]:
    """The network after all steps, and its loss over the last tenth of them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        network = Network(store.shape[1:], len(store.classes))
    network = network.to(device).train()
    descent = torch.optim.SGD(
        network.parameters(), lr=config.learning_rate, momentum=_MOMENTUM, weight_decay=_DECAY, nesterov=True
    )
    generator = torch.Generator().manual_seed(config.seed)
    losses = []
    for step in tqdm(range(config.steps), desc="classifier", unit="step", disable=not progress):
        ids = torch.randint(len(store), (config.batch,), generator=generator)
        flipped = torch.rand(config.batch, generator=generator) < (0.5 if config.flip else 0)
        x, labels = store.images(ids), store.labels[ids]
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x).to(device)
        for group in descent.param_groups:
            group["lr"] = config.learning_rate * _share_of_rate((step + 0.5) / config.steps)
        loss = functional.cross_entropy(network(x), labels.to(device), label_smoothing=_SMOOTHING)
        descent.zero_grad(set_to_none=True)
        loss.backward()
        descent.step()
        if step >= config.steps - max(1, config.steps // 10):
            losses.append(loss.detach())
    last = float(torch.stack(losses).mean())
    if not math.isfinite(last):
        raise InputError(
            f"the loss is no longer finite at learning rate {config.learning_rate:g}: take a smaller one"
        )
    return network.eval(), last


def _share_of_rate(done: float) -> float:
    """Of the largest rate, after the share `done` of all steps: up in a line, then down to 0."""
    return min(done / _WARM_UP, (1 - done) / (1 - _WARM_UP))
