"""What an experiment is about: index, run, source, held-out images, each opened when it is asked for.

A thing that was not named is an error that names the option, at the moment when somebody needs it.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nnflow.checkpoint import learned_field
from nnflow.errors import InputError
from nnflow.files import shown
from nnflow.index import NeighbourIndex
from nnflow.memory import DEFAULT_BUDGET
from nnflow.planning import EXACT
from nnflow.store import ImageStore
from nnflow.unet import LearnedVelocity, newest_checkpoint, read_state
from nnflow.velocity import EmpiricalVelocity

OPTIONS = {
    "index": "Folder of the index.",
    "run": "Folder of the training run whose u_theta is measured.",
    "source": "Images in any form that nnflow index takes, read again at every size.",
    "held_out": "Index of images not trained on.",
}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the command line named; None for what it did not.

    Attributes:
        out: the folder of all figures.
        index: of an index.
        run: of a training run.
        source: of images.
        held_out: of an index of images not trained on.
        tolerance: relative velocity error of near and far; None for the exact field.
        memory: working memory in bytes.
        device: where fields and networks live; None for a GPU where there is one.
        progress: show bars on stderr.
    """

    out: Path
    index: Path | None = None
    run: Path | None = None
    source: Path | None = None
    held_out: Path | None = None
    tolerance: float | None = None
    memory: int = DEFAULT_BUDGET
    device: torch.device | None = None
    progress: bool = False

    def named(self, what: str) -> Path:
        """The path given for `what`, one of `OPTIONS`.

        Raises:
            InputError: it was not named.
        """
        path = getattr(self, what)
        if path is None:
            option = "--" + what.replace("_", "-")
            about = OPTIONS[what]
            raise InputError(f"{option} was not named: wanted the {about[0].lower()}{about[1:-1]}")
        assert isinstance(path, Path)
        return path

    @cached_property
    def where(self) -> torch.device:
        """The device."""
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def store(self) -> ImageStore:
        """The images of the index.

        Raises:
            InputError: latents, of which figures draw nothing.
        """
        store = ImageStore.open(self.named("index"))
        store.refuse_latents("figures")
        return store

    @cached_property
    def opened(self) -> NeighbourIndex:
        """The index.

        Raises:
            InputError: of latents, of which figures draw nothing.
        """
        index = NeighbourIndex.open(self.named("index"))
        index.store.refuse_latents("figures")
        return index

    @cached_property
    def held_out_store(self) -> ImageStore:
        """Images not trained on.

        Raises:
            InputError: latents, or of another shape than the images of the index.
        """
        held_out = ImageStore.open(self.named("held_out"))
        held_out.refuse_latents("figures")
        if held_out.shape[1:] != self.store.shape[1:]:
            raise InputError(
                f"{shown(held_out.folder)}: held-out images of {held_out.shape[1:]} (C, H, W), the index has "
                f"{self.store.shape[1:]}; index them at the same size and colours"
            )
        return held_out

    @cached_property
    def learned(self) -> LearnedVelocity:
        """The network of the run (averaged weights), checked to be of the images of the index.

        Raises:
            InputError: trained on other images, or on other shapes.
        """
        learned = learned_field(self.named("run"), self.store, ema=True, device=self.where)
        if learned.shape != self.store.shape[1:]:
            raise InputError(
                f"{shown(self.run)}: a network for {learned.shape} (C, H, W), the index has "
                f"{self.store.shape[1:]}; name the index it was trained on"
            )
        return learned

    @property
    def flip(self) -> bool:
        """Whether the network of the run, if any, was trained with mirror images."""
        config = None if self.run is None else self.learned.config
        return config is not None and config.flip

    def field(self, *, flip: bool = False, exact: bool = False) -> EmpiricalVelocity:
        """u* of the index: within the tolerance asked for, or exact where none was or `exact` says so."""
        if self.tolerance is None or exact:
            return EmpiricalVelocity.exact(self.store, flip=flip, memory=self.memory, device=self.where)
        return EmpiricalVelocity.near_and_far(
            self.opened, tolerance=self.tolerance, flip=flip, memory=self.memory, device=self.where
        )

    @property
    def field_key(self) -> dict[str, Any]:
        """What a value measured with `field` depends on, for the key of a part."""
        key: dict[str, Any] = {"images": self.store.fingerprint, "field": self.field_name}
        if self.tolerance is not None:  # another calibration may choose other ladders
            path = self.named("index") / "calibration.json"
            key["calibration"] = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
        return key

    @property
    def field_name(self) -> str:
        """How the sum over the images is taken, for captions: "exact", "near and far, tolerance 0.01"."""
        return EXACT if self.tolerance is None else f"near and far, tolerance {self.tolerance:g}"

    @cached_property
    def run_fingerprint(self) -> str:
        """Of the weights that `learned` opens: another step or another seed is another run."""
        return weights_fingerprint(self.named("run"))

    def facts(self) -> dict[str, Any]:
        """What was named, by folder, fingerprint and size, for the record."""
        found: dict[str, Any] = {}
        for what in ("index", "held_out"):
            if getattr(self, what) is not None:
                store = self.store if what == "index" else self.held_out_store
                found[what] = {
                    "folder": str(store.folder),
                    "fingerprint": store.fingerprint,
                    "shape": list(store.shape),
                    "classes": len(store.classes),
                }
        if self.run is not None:
            found["run"] = {"folder": str(self.run), "fingerprint": self.run_fingerprint}
            checkpoint = newest_checkpoint(self.run)
            if checkpoint is not None:
                state = read_state(checkpoint)
                found["run"] |= {"step": state["step"], "config": state["config"].to_json()}
        if self.source is not None:
            found["source"] = {"path": str(self.source)}
        return found


def weights_fingerprint(run: Path) -> str:
    """Digest of the newest weights of a training run, or of a folder that holds a network.

    Raises:
        CheckpointError: a checkpoint that cannot be read.
        InputError: nothing there that was trained.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is not None:
        state = read_state(checkpoint)
        marks = json.dumps(state["files"], sort_keys=True)
        return hashlib.blake2b(marks.encode(), digest_size=16).hexdigest()
    weights = sorted(run.glob("*.safetensors")) or sorted(run.glob("*/*.safetensors"))
    if not weights:
        raise InputError(f"{shown(run)}: no trained network there; wanted what nnflow train wrote")
    digest = hashlib.blake2b(digest_size=16)
    for path in weights:
        digest.update(path.read_bytes())
    return digest.hexdigest()
