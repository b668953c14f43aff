"""Flow-matching training: E | u_theta(x_t, t) - target(x_t, t, x1) |^2, minimised by Adam.

A run is a folder (see `checkpoint`); `train` begins one or goes on with it.
"""

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnflow import checkpoint as checkpoints
from nnflow.calibration import FILE as CALIBRATION
from nnflow.checkpoint import RunRecord
from nnflow.config import TrainConfig
from nnflow.diary import Diary, Pace, diary
from nnflow.errors import InputError
from nnflow.files import folder_lock
from nnflow.index import NeighbourIndex
from nnflow.memory import parse_bytes
from nnflow.precision import full_float32
from nnflow.settling import SETTLING, read_settling
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher, make_matcher
from nnflow.trainer import Trainer
from nnflow.unet import LearnedVelocity, build, newest_checkpoint, train_extra
from nnflow.velocity import EmpiricalVelocity

OnSample = Callable[[LearnedVelocity, int, Path], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How a run ended.

    Attributes:
        folder: of the run.
        checkpoint: its newest one.
        step: optimiser steps taken in all.
        loss: mean squared error per pixel over the last `log_every` steps; nan where none was
            taken.
        seconds: this call took.
        pace: images per second of this call, and what its targets were; None where it took no step.
        interrupted: stopped by SIGINT before the last step.
    """

    folder: Path
    checkpoint: Path
    step: int
    loss: float
    seconds: float
    pace: Pace | None
    interrupted: bool


def train(
    source: ImageStore | NeighbourIndex,
    out: str | Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = False,
    on_sample: OnSample | None = None,
) -> Trained:
    """Trains a network on the images of `source`; the folder `out` holds everything of the run.

    Under `accelerate launch` each process calls this with the same arguments; one of them writes.

    Args:
        source: the images; an index where the target needs neighbours.
        out: a new folder, or with `resume` that of a run.
        config: every knob; see `resolve`.
        resume: go on from the newest checkpoint. `config` may ask for more steps, nothing else.
        progress: a bar on stderr.
        on_sample: called as on_sample(averaged network, step, folder) every `sample_every` steps
            and after the last, in the process that writes.

    Raises:
        InputError: a config that does not suit these images or this machine.
        CheckpointError: `out` holds another run, or a checkpoint that is damaged; or the loss is
            no longer finite.
        BusyError: another process trains in `out`.
        StoreError: `out` cannot be written, and what was written before is kept; or the field is
            near-and-far and the index has not been calibrated.
        MissingExtraError: the extra `train` is not installed.
    """
    run, began = Path(out), time.perf_counter()
    accelerator = _accelerator(config)
    store = source.store if isinstance(source, NeighbourIndex) else source
    with contextlib.ExitStack() as stack:
        stack.enter_context(_same_random_state_after(accelerator.device))
        # Else weights would depend on a switch of the caller's, and on when targets are made beside them.
        stack.enter_context(full_float32())
        matcher = _matcher(source, config, accelerator.device)
        record = _record(source, config)
        network = build(config, record.shape, len(record.classes))
        if accelerator.is_main_process:
            stack.enter_context(folder_lock(run))
            checkpoints.start_run(run, record, resume=resume)
        accelerator.wait_for_everyone()
        trainer = Trainer(accelerator, store, matcher, network, record, run)
        trainer.restore()
        notes = stack.enter_context(
            diary(
                accelerator,
                run / "logs",
                first=trainer.step,
                last=config.steps,
                batch=config.batch,
                tolerance=config.tolerance,
                progress=progress,
            )
        )
        stack.enter_context(trainer.supplied())
        interrupt = stack.enter_context(_interruptible())
        loss = _loop(trainer, notes, interrupt, on_sample)
        done = newest_checkpoint(run)
        assert done is not None
        return Trained(
            folder=run,
            checkpoint=done,
            step=trainer.step,
            loss=loss,
            seconds=time.perf_counter() - began,
            pace=notes.pace,
            interrupted=trainer.step < config.steps,
        )


def _loop(
    trainer: Trainer,
    notes: Diary,
    interrupt: threading.Event,
    on_sample: OnSample | None,
) -> float:
    """Steps until the last one or until interrupted; the mean loss of the last few."""
    config = trainer.config
    saved = trainer.step
    if trainer.step == 0:
        trainer.save()  # so that there is something to go on from, whatever happens
    while trainer.step < config.steps:
        step = trainer.advance()
        notes.note(step.loss, step.norm, step.estimates)
        last = trainer.step == config.steps
        stop = trainer.stop_agreed(interrupt.is_set())
        if last or stop or trainer.step % config.log_every == 0:
            trainer.check()
            rate = trainer.optimizer.param_groups[0]["lr"]
            on_targets, waiting = trainer.batches.clock.take(), trainer.waiting.take()
            notes.write(trainer.step, rate, on_targets=on_targets, waiting=waiting)
        if last or stop or trainer.step % config.checkpoint_every == 0:
            trainer.save()
            saved = trainer.step
        drawn = config.sample_every and (last or trainer.step % config.sample_every == 0)
        if on_sample and drawn and not stop:
            if trainer.accelerator.is_main_process:
                on_sample(trainer.ema, trainer.step, trainer.run / "samples")
            trainer.accelerator.wait_for_everyone()
        if stop:
            break
    assert saved == trainer.step
    return notes.loss


def _accelerator(config: TrainConfig) -> Any:
    """What accelerate makes of this process, its device and the others."""
    accelerate = train_extra("accelerate")
    train_extra("tensorboard")  # missing, it would be missed only after the first steps
    # A process that trained in another precision before keeps it otherwise, and refuses this one.
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(mixed_precision=config.mixed_precision)
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate 1.15 would train in float32 and say nothing
        raise InputError("mixed_precision fp16 needs a GPU, and there is none: use bf16 or no")
    processes = accelerator.num_processes
    if config.batch % processes:
        raise InputError(
            f"a batch of {config.batch} cannot be divided among {processes} processes; take a "
            "multiple of them"
        )
    return accelerator


def _matcher(
    source: ImageStore | NeighbourIndex, config: TrainConfig, device: torch.device
) -> EmpiricalFlowMatcher:
    """What turns a batch into targets."""
    store = source.store if isinstance(source, NeighbourIndex) else source
    name, memory = _field_name(config), parse_bytes(config.memory)
    field = settling = None
    if name == "exact":
        field = EmpiricalVelocity.exact(store, flip=config.flip, memory=memory, device=device)
    elif name is not None:
        if not isinstance(source, NeighbourIndex):
            raise InputError(
                f"target {config.target} with field {name} needs neighbours: pass a NeighbourIndex, "
                "not an ImageStore"
            )
        if name == "nearest":
            field = EmpiricalVelocity.nearest(
                source, k=config.k, flip=config.flip, memory=memory, device=device
            )
        else:
            field = EmpiricalVelocity.near_and_far(
                source, tolerance=config.tolerance, flip=config.flip, memory=memory, device=device
            )
            settling = read_settling(store)
    return make_matcher(
        config.target,
        store,
        field=field,
        samples=config.samples,
        flip=config.flip,
        memory=memory,
        settling=settling,
    )


def _field_name(config: TrainConfig) -> str | None:
    """Which field the target asks; None for none."""
    if config.target == "efm-unbiased" and config.field == "exact":
        return "nearest"  # from all images there is nothing to be unbiased of
    return config.field if config.target in ("efm", "efm-unbiased") else None


def _record(source: ImageStore | NeighbourIndex, config: TrainConfig) -> RunRecord:
    store = source.store if isinstance(source, NeighbourIndex) else source
    return RunRecord(
        config=config,
        images=store.fingerprint,
        index=_what_is_asked(source, _field_name(config)),
        shape=store.shape[1:],
        classes=tuple(store.classes),
    )


def _what_is_asked(source: ImageStore | NeighbourIndex, field: str | None) -> str:
    """What the targets depend on beside the images: the parts of the index that `field` asks."""
    if field in (None, "exact") or not isinstance(source, NeighbourIndex):
        return "none"
    if field == "nearest":
        return "{kind}, rank {rank}, seed {seed}, embedding {embedding}".format(**source.manifest)
    parts = [
        f"{name} {_digest(source.folder / file)}"
        for name, file in (("calibration", CALIBRATION), ("settling times", SETTLING))
    ]
    return ", ".join(["embedding {embedding}".format(**source.manifest), *parts])


def _digest(path: Path) -> str:
    if not path.exists():
        return "none"
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


@contextlib.contextmanager
def _same_random_state_after(device: torch.device) -> Iterator[None]:
    """Gives the caller's random numbers back as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first SIGINT sets; the second one kills as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may listen
        return
    usual = signal.getsignal(signal.SIGINT)

    def ask(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, usual)
