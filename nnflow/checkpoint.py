"""The folder of a training run: whole or absent, whatever moment it is interrupted.

    config.json                       the resolved config, versions, and which images it is for
    checkpoints/step-00001000/        unet/, ema/ (UNet2DModel.from_pretrained opens both),
                                      optimizer.safetensors, state.json (written last)
    latest -> checkpoints/step-...    so that `latest/ema` is always the network to use
    logs/, samples/                   TensorBoard, sample grids

A checkpoint is written under the name step-00001000.partial and renamed when everything is on disk.
"""

import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nnflow.config import TrainConfig, differences
from nnflow.errors import CheckpointError, InputError, StoreError
from nnflow.files import disk_errors, file_mark, read_json, shown, sync_folder, write_json
from nnflow.store import ImageStore
from nnflow.unet import (
    FILES,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    LearnedVelocity,
    check_files,
    newest_checkpoint,
    read_state,
    read_tensors,
)

_CONFIG = "config.json"
_KIND = "nnflow run"
_OURS = {_CONFIG, "checkpoints", "latest", "logs", "samples", ".lock"}
_MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is, apart from its weights.

    Attributes:
        config: every knob.
        images: fingerprint of the store.
        index: what the neighbours in the targets depend on; "none" for a target without.
        shape: (C, H, W).
        classes: their names, in the order of the labels.
    """

    config: TrainConfig
    images: str
    index: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON values, with the versions that wrote them."""
        return {
            "kind": _KIND,
            "nnflow": version("nnflow"),
            "torch": torch.__version__,
            "images": self.images,
            "index": self.index,
            "shape": list(self.shape),
            "classes": list(self.classes),
            "config": self.config.to_json(),
        }


def read_record(run: Path) -> RunRecord:
    """What the run in `run` was started with.

    Raises:
        CheckpointError: no run there, or its config.json is truncated or foreign.
    """
    place = run / _CONFIG
    try:
        found = read_json(place, "the config of a run")
        if found.get("kind") != _KIND:
            raise CheckpointError(f"{shown(place)}: not of an nnflow run; name another folder")
        channels, height, width = map(int, found["shape"])
        return RunRecord(
            config=TrainConfig.from_json(found["config"]),
            images=str(found["images"]),
            index=str(found["index"]),
            shape=(channels, height, width),
            classes=tuple(map(str, found["classes"])),
        )
    except (StoreError, InputError) as error:
        raise CheckpointError(f"{shown(place)}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{shown(place)}: lacks {shown(error)} of a run") from error


def learned_field(run: Path, store: ImageStore, *, ema: bool, device: torch.device) -> LearnedVelocity:
    """The network of a training run on the images of `store`.

    Raises:
        InputError: it was trained on other images, so u* of these says nothing about it.
    """
    learned = LearnedVelocity.open(run, ema=ema, device=device)
    if (run / _CONFIG).exists() and (run / "checkpoints").exists():
        trained_on = read_record(run).images
        if trained_on != store.fingerprint:
            raise InputError(
                f"{shown(run)}: trained on other images ({trained_on[:12]}...) than {shown(store.folder)} "
                f"holds ({store.fingerprint[:12]}...); name the index it was trained on"
            )
    return learned


def start_run(run: Path, record: RunRecord, *, resume: bool) -> None:
    """Makes `run` ready for `record`: a new folder, or the same run again.

    Raises:
        CheckpointError: a run is there and `resume` is not asked for, or the other way round; the
            run there is another; the folder holds other things.
        StoreError: the folder cannot be written.
    """
    if not (run / _CONFIG).exists():
        _check_empty(run)
        if resume:
            raise CheckpointError(f"{shown(run)}: no run to resume; leave out --resume to start one")
        with disk_errors(run, "creating"):
            run.mkdir(parents=True, exist_ok=True)
    else:
        if not resume:
            raise CheckpointError(
                f"{shown(run)}: a run is there already; continue it with --resume, or name another folder"
            )
        _check_same(run, read_record(run), record)
    write_json(run / _CONFIG, record.to_json())


def _check_empty(run: Path) -> None:
    if run.is_dir():
        strange = sorted(p.name for p in run.iterdir() if p.name not in _OURS)
        if strange or newest_checkpoint(run):
            what = shown(strange[0]) if strange else "checkpoints without config.json"
            raise CheckpointError(f"{shown(run)}: holds {what}; name a new folder for the run")


def _check_same(run: Path, saved: RunRecord, wanted: RunRecord) -> None:
    found = [differences(saved.config, wanted.config)]
    for name in ("images", "index", "shape", "classes"):
        before, now = getattr(saved, name), getattr(wanted, name)
        if before != now:
            found.append(f"{name} were {shown(before)}, now {shown(now)}")
    changed = "; ".join(part for part in found if part)
    if changed:
        raise CheckpointError(
            f"{shown(run)}: cannot be resumed, {changed}; repeat what it was started with, or "
            "name another folder"
        )


def save(
    run: Path,
    *,
    step: int,
    network: LearnedVelocity,
    ema: LearnedVelocity,
    optimizer: torch.optim.Optimizer,
    record: RunRecord,
    extra: dict[str, Any],
) -> Path:
    """Writes a checkpoint, points `latest` at it, and removes all but the newest `keep`.

    Args:
        run: the folder of the run.
        step: optimiser steps taken.
        network: the weights being trained.
        ema: their average.
        optimizer: Adam over `network.parameters()`.
        record: of the run.
        extra: JSON values to be given back by `load`.

    Raises:
        StoreError: the disk is full or read-only; the checkpoints before are kept.
    """
    place = run / "checkpoints" / f"step-{step:08d}"
    partial = place.with_name(place.name + ".partial")
    with disk_errors(place, "writing"):
        place.parent.mkdir(exist_ok=True)
        _clear(place.parent)
        try:
            partial.mkdir()
            network.unet.save_pretrained(partial / "unet")  # type: ignore[operator]
            ema.unet.save_pretrained(partial / "ema")  # type: ignore[operator]
            save_file(_moments(network, optimizer), partial / OPTIMIZER)
            marks = {name: file_mark(partial / name) for name in FILES}
            state = {"step": step, "adam_steps": _adam_steps(optimizer), "extra": extra}
            write_json(partial / STATE, {**record.to_json(), **state, "files": marks})
            _sync(partial)
            partial.replace(place)
        except SafetensorError as error:  # the Rust side reports a full disk in its own words
            raise StoreError(
                f"writing {shown(place)}: {shown(error)}; free space or name another disk; the "
                "checkpoints before it are kept"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sync_folder(place.parent)
        _point(run / "latest", Path("checkpoints") / place.name)
        _prune(place.parent, record.config.keep)
    return place


def load(
    checkpoint: Path,
    *,
    network: LearnedVelocity,
    ema: LearnedVelocity,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, dict[str, Any]]:
    """Puts a checkpoint back, every bit of it.

    Returns:
        The steps taken, and the `extra` of `save`.

    Raises:
        CheckpointError: a file is missing, truncated, foreign, or of another network.
    """
    state = read_state(checkpoint)
    check_files(checkpoint, state)
    for name, part in (("unet", network), ("ema", ema)):
        wanted = {key: value.shape for key, value in part.unet.state_dict().items()}
        part.unet.load_state_dict(read_tensors(checkpoint / name / WEIGHTS, wanted))
    shapes = {name: value.shape for name, value in network.unet.named_parameters()}
    wanted = {f"{moment}.{name}": shapes[name] for moment in _MOMENTS for name in shapes}
    found = read_tensors(checkpoint / OPTIMIZER, wanted)
    # Adam counts its steps per parameter; they are all the same number, kept in state.json.
    taken = torch.tensor(float(state["adam_steps"]))
    settings = optimizer.state_dict()
    settings["state"] = {
        row: {"step": taken.clone()} | {moment: found[f"{moment}.{name}"] for moment in _MOMENTS}
        for row, name in enumerate(shapes)
    }
    optimizer.load_state_dict(settings)
    return state["step"], state["extra"]


def _adam_steps(optimizer: torch.optim.Optimizer) -> int:
    """Steps that Adam has taken: fewer than the loop's where a loss scaler skipped some."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def _moments(network: LearnedVelocity, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in network.unet.named_parameters():
        state = optimizer.state.get(parameter, {})
        for moment in _MOMENTS:
            tensor = state.get(moment, torch.zeros_like(parameter))
            found[f"{moment}.{name}"] = tensor.detach().contiguous()
    return found


def _sync(folder: Path) -> None:
    """Puts every file and folder below `folder` on disk."""
    for place in [*folder.rglob("*"), folder]:
        if place.is_dir():
            sync_folder(place)
        else:
            with place.open("rb") as file:
                os.fsync(file.fileno())


def _point(link: Path, target: Path) -> None:
    """Makes `link` point at `target` at once: it never points nowhere."""
    partial = link.with_name(link.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(link)


def _clear(checkpoints: Path) -> None:
    """Removes what an interrupted write or removal left."""
    for place in checkpoints.glob("step-*.partial"):
        shutil.rmtree(place)


def _prune(checkpoints: Path, keep: int) -> None:
    whole = sorted(p for p in checkpoints.iterdir() if re.fullmatch(r"step-\d{8}", p.name))
    for place in whole[:-keep]:
        # Renamed first: killed half-way, what is left of it does not look like a checkpoint.
        doomed = place.with_name(place.name + ".partial")
        place.replace(doomed)
        shutil.rmtree(doomed)
