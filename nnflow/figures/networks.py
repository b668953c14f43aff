"""Networks that an experiment trains: a run folder each among its parts, gone on with after a kill.

The values of a training are those of a preset of `nnflow train`, by default the paper's recipe, save for what
the settings name.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnflow.config import BOOKKEEPING, PRESETS, TrainConfig, knob, resolve
from nnflow.errors import InputError
from nnflow.figures.experiment import Settings
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts
from nnflow.files import disk_errors, whole_file
from nnflow.index import NeighbourIndex
from nnflow.metrics import count_memorised
from nnflow.scan import nearest_images
from nnflow.sources.subset import drawn
from nnflow.store import ImageStore
from nnflow.training import run_record, train
from nnflow.unet import newest_checkpoint, read_state

_INTERRUPTIONS = 50  # each leaves a checkpoint of its own, which must not push out one that is measured
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Settings):
    """How the networks are trained; 0 or nothing keeps the preset's value."""

    preset: str = knob("cifar10", "of nnflow train: values not given here", choices=tuple(PRESETS))
    steps: int = knob(0, "optimiser steps of each network", low=0, high=99_999_999)
    batch: int = knob(0, "images per step", low=0)
    learning_rate: float = knob(0.0, "Adam's step size", low=0.0, high=1.0)
    warmup: int = knob(0, "steps over which it grows", low=0)
    ema_decay: float = knob(0.0, "decay of the averaged weights", low=0.0, high=0.9999999)
    channels: tuple[int, ...] = knob((), "channels per level, e.g. 32,64", low=8)
    head_dim: int = knob(0, "channels per attention head", low=0)
    blocks: int = knob(0, "residual blocks per level", low=0)
    attention: tuple[int, ...] = knob((), "sides of the levels with attention, pixels", low=1)
    flip: str = knob("preset", "mirror images at random", choices=("preset", "yes", "no"))

    def training(self, target: str, seed: int, *, samples: int = 128, keep: int = 1) -> TrainConfig:
        """The config of one network.

        Args:
            target: of `targets.TARGETS`.
            seed: of everything random in it.
            samples: M of `efm-m`.
            keep: equally many steps apart, so many checkpoints are kept.

        Raises:
            InputError: values that do not go together.
        """
        shared = {knob.name for knob in dataclasses.fields(TrainingSettings)} - {"preset", "flip"}
        given = {name: getattr(self, name) for name in shared if getattr(self, name)}
        if self.flip != "preset":
            given["flip"] = self.flip == "yes"
        config = resolve(self.preset, given | {"target": target, "seed": seed, "samples": samples})
        every = max(1, config.steps // keep)
        return config.replace({"sample_every": 0, "checkpoint_every": every, "keep": keep + _INTERRUPTIONS})


def trained(
    name: str,
    source: ImageStore | NeighbourIndex,
    config: TrainConfig,
    parts: Parts,
    *,
    progress: bool = False,
) -> Path:
    """The folder of a run of `config` on the images of `source`: trained, gone on with, or as it is.

    Args:
        name: of the part.
        source: the images; an index where the target needs neighbours.
        config: of the training.
        parts: where the run is kept, by all that its weights depend on.
        progress: show a bar on stderr.

    Raises:
        KeyboardInterrupt: the training was interrupted; a checkpoint of where it was has been written.
    """
    record = run_record(source, config)
    knobs = {name: value for name, value in config.to_json().items() if name not in BOOKKEEPING}
    folder = parts.place(name, {"images": record.images, "index": record.index, "config": knobs})
    checkpoint = newest_checkpoint(folder)
    if checkpoint is None or read_state(checkpoint)["step"] < config.steps:
        begun = (folder / "config.json").exists()
        if train(source, folder, config, resume=begun, progress=progress).interrupted:
            raise KeyboardInterrupt
    return folder


def subset(store: ImageStore, count: int, seed: int, parts: Parts) -> ImageStore:
    """`count` images of `store` as a store among the parts; those of a smaller count are among them.

    Raises:
        InputError: more than there are.
    """
    rows = torch.from_numpy(subset_rows(store, count, seed))
    if count == len(store):
        return store
    folder = parts.place(f"images-{count}", {"images": store.fingerprint, "count": count, "seed": seed})
    arrays = {"data": store.pixels[rows].numpy().reshape(count, *store.shape[1:])}
    if store.classes:
        arrays["labels"] = np.array(store.classes)[store.labels[rows].numpy()]
    with disk_errors(folder, "creating"):
        folder.mkdir(parents=True, exist_ok=True)
    source = folder / "images.npz"
    if not source.exists():
        with whole_file(source) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return ImageStore.build(source, folder / "store", size=store.shape[-1], grey=store.shape[1] == 1)


def subset_rows(store: ImageStore, count: int, seed: int) -> np.ndarray:
    """Which images of `store` are in the subset of `count`, ascending.

    Raises:
        InputError: more than there are.
    """
    if count > len(store):
        raise InputError(f"{count:,} images wanted, the index holds {len(store):,}; take fewer")
    return drawn(len(store), count, seed=seed)


def unseen(
    inputs: Inputs, count: int, seed: int, *, at_most: int
) -> tuple[ImageStore | Tensor | None, dict[str, Any]]:
    """Images that no network on a subset of up to `count` has seen, and what they are, for a key.

    Those of --held-out where it was named, else at most `at_most` of the index outside the subset, else None.
    """
    if inputs.held_out is not None:
        held_out = inputs.held_out_store
        return held_out, {"images": held_out.fingerprint}
    outside = np.setdiff1d(np.arange(len(inputs.store)), subset_rows(inputs.store, count, seed))
    if len(outside) < 2:
        return None, {"images": None}
    chosen = outside[drawn(len(outside), min(at_most, len(outside)), seed=seed)]
    about = {"images": inputs.store.fingerprint, "outside": count, "seed": seed, "at_most": at_most}
    return inputs.store.images(torch.from_numpy(chosen)), about


def nearness_key(*, flip: bool) -> dict[str, Any]:
    """What tells a part that `nearness` made with `flip` from one without, which came before it."""
    return {"mirrored": True} if flip else {}


def nearness(store: ImageStore, images: ImageStore | Tensor, *, flip: bool, memory: int) -> dict[str, Any]:
    """How near `images` lie to those of `store`, for JSON: memorised share, quantiles, each distance.

    With `flip` an image of the store is as near as itself or its mirror image.
    """
    queries = images if isinstance(images, Tensor) else images.images(torch.arange(len(images)))
    near = nearest_images(store, queries, 2, flip=flip, memory=memory)
    first = near.distances[:, 0].double()
    quantiles = first.quantile(torch.tensor(_QUANTILES, dtype=torch.float64))
    return {
        "memorised": dataclasses.asdict(count_memorised(near.distances)),
        "quantiles": dict(zip([f"p{100 * q:.0f}" for q in _QUANTILES], quantiles.tolist(), strict=True)),
        "distances": first.tolist(),
        "nearest": near.ids[:, 0].tolist(),
        "mirrored": near.mirrored[:, 0].tolist(),
    }
