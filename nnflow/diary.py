"""What is told about a training run while it goes on and after: TensorBoard points, a bar, its pace."""

import contextlib
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnflow.tally import TargetFigures
from nnflow.unet import train_extra


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast some steps went, and what their targets were.

    Attributes:
        images_per_second: over all processes, checkpoints and samples on the way included.
        on_targets: seconds in which targets were made, as a share of all.
        waiting: seconds in which the network had no batch to work on, as a share of all: the loading of
            images counts, and a target that was made beside the network does not.
        estimates: of the fields behind the targets; None where no field was asked.
    """

    images_per_second: float
    on_targets: float
    waiting: float
    estimates: TargetFigures | None

    def points(self) -> dict[str, float]:
        """The numbers by the names they have in TensorBoard."""
        found = {
            "images_per_second": self.images_per_second,
            "share_of_time_on_targets": self.on_targets,
            "share_of_time_waiting_for_targets": self.waiting,
        }
        if self.estimates is not None:
            found |= {
                "targets/asked": self.estimates.asked,
                "targets/tail_mass": self.estimates.tail_mass,
                "targets/effective_images": self.estimates.ess,
                "targets/certified": self.estimates.certified,
                "targets/calibrated_error": self.estimates.error,
            }
        return {name: value for name, value in found.items() if not math.isnan(value)}

    def __str__(self) -> str:
        text = (
            f"{self.images_per_second:.4g} images/s; {100 * self.on_targets:.0f} % of the time on targets, "
            f"{100 * self.waiting:.0f} % waiting for batches"
        )
        return text if self.estimates is None else f"{text}; {self.estimates}"


class _Sums:
    """What adds up over steps, of one process and then of all."""

    def __init__(self, steps: int = 0, seconds: float = 0.0) -> None:
        self.steps, self.seconds = steps, seconds
        self.times = torch.zeros(2, dtype=torch.float64)  # on targets, waiting
        self.estimates: Tensor | None = None

    def add(self, other: "_Sums") -> None:
        self.steps += other.steps
        self.seconds += other.seconds
        self.times = self.times + other.times
        if other.estimates is not None:
            self.estimates = other.estimates if self.estimates is None else self.estimates + other.estimates

    def pace(self, batch: int, tolerance: float) -> Pace:
        on_targets, waiting = (self.times / self.seconds).tolist()
        pairs = self.steps * batch
        known = self.estimates
        return Pace(
            images_per_second=pairs / self.seconds,
            on_targets=on_targets,
            waiting=waiting,
            estimates=None if known is None else TargetFigures.of(known, pairs, tolerance=tolerance),
        )


class Diary:
    """Means since the last entry, over all processes; written by one of them.

    Args:
        accelerator: of the run.
        board: TensorBoard's writer; None in processes that do not write.
        bar: moves with the steps.
        batch: images per step, over all processes.
        tolerance: of `TargetFigures`.
    """

    def __init__(
        self, accelerator: Any, board: Any, bar: "tqdm[Any]", *, batch: int, tolerance: float
    ) -> None:
        self._accelerator, self._board, self._bar = accelerator, board, bar
        self._batch, self._tolerance = batch, tolerance
        self._whole = _Sums()
        self.loss = float("nan")  # of the last entry
        self._begin()

    @property
    def pace(self) -> Pace | None:
        """Of all steps with an entry; None without one."""
        return self._whole.pace(self._batch, self._tolerance) if self._whole.steps else None

    def _begin(self) -> None:
        self._steps, self._since = 0, time.perf_counter()
        self._sums = torch.zeros(2, device=self._accelerator.device)
        self._estimates: Tensor | None = None

    def note(self, loss: Tensor, norm: Tensor, estimates: Tensor) -> None:
        """Adds one step, without waiting for the device."""
        self._sums += torch.stack((loss, norm))
        self._estimates = estimates if self._estimates is None else self._estimates + estimates
        self._steps += 1
        self._bar.update()

    def write(self, step: int, rate: float, *, on_targets: float, waiting: float) -> None:
        """Writes the means since the last entry.

        Args:
            step: optimiser steps taken.
            rate: Adam's step size.
            on_targets: seconds in which this process made targets, since the last entry.
            waiting: seconds it waited for batches.
        """
        gather, estimates = self._accelerator.gather, self._estimates
        assert estimates is not None, "an entry without a step"
        self.loss, norm = (gather(self._sums[None]).mean(0) / self._steps).tolist()
        here = _Sums(self._steps, time.perf_counter() - self._since)
        times = torch.tensor([[on_targets, waiting]], dtype=torch.float64, device=self._sums.device)
        here.times = gather(times).mean(0).cpu()
        here.estimates = gather(estimates[None]).sum(0).cpu()
        self._whole.add(here)
        pace = here.pace(self._batch, self._tolerance)
        self._bar.set_postfix(
            {"loss": f"{self.loss:.4f}", "images/s": f"{pace.images_per_second:.4g}"}
            | {"waiting": f"{100 * pace.waiting:.0f}%"},
            refresh=False,
        )
        if self._board is not None:
            values = {"loss": self.loss, "gradient_norm": norm, "learning_rate": rate} | pace.points()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._begin()


@contextlib.contextmanager
def diary(
    accelerator: Any,
    folder: Path,
    *,
    first: int,
    last: int,
    batch: int,
    tolerance: float,
    progress: bool,
) -> Iterator[Diary]:
    """A diary in `folder` of steps `first` to `last`, with a bar where `progress` is on."""
    main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        board = None
        if main:
            writer = train_extra("torch.utils.tensorboard").SummaryWriter
            # A killed run has points after its checkpoint: the same steps again replace them.
            board = writer(str(folder), purge_step=first + 1)
            stack.callback(board.close)
        bar = tqdm(
            total=last,
            initial=first,
            desc="training",
            unit="step",
            disable=not (progress and main),
        )
        yield Diary(accelerator, board, stack.enter_context(bar), batch=batch, tolerance=tolerance)


class Stopwatch:
    """Seconds spent in a block, without making a GPU wait for the clock; read from any thread.

    On a GPU they are those of the current stream: from when it had done all before the block until it had
    done the block, so also those in which it had nothing to do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        if self._device.type == "cuda":
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            with self._lock:
                self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            took = time.perf_counter() - began
            with self._lock:
                self._seconds += took

    def take(self) -> float:
        """Seconds since the last call."""
        with self._lock:
            seconds, events = self._seconds, self._events
            self._seconds, self._events = 0.0, []
        if events:
            torch.cuda.synchronize(self._device)
        return seconds + sum(a.elapsed_time(b) for a, b in events) / 1e3
