"""What is told about a training run while it goes on: TensorBoard points and a bar."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nnflow.unet import train_extra


class Diary:
    """Means since the last entry, over all processes; written by one of them."""

    def __init__(self, accelerator: Any, board: Any, bar: "tqdm[Any]", batch: int) -> None:
        self._accelerator, self._board, self._bar, self._batch = accelerator, board, bar, batch
        self.loss = float("nan")  # of the last entry
        self._begin()

    def _begin(self) -> None:
        self._steps, self._since = 0, time.perf_counter()
        self._sums = torch.zeros(2, device=self._accelerator.device)

    def note(self, loss: Tensor, norm: Tensor) -> None:
        """Adds one step, without waiting for the device."""
        self._sums += torch.stack((loss, norm))
        self._steps += 1
        self._bar.update()

    def write(self, step: int, rate: float, on_targets: float) -> None:
        """Writes the means since the last entry.

        Args:
            step: optimiser steps taken.
            rate: Adam's step size.
            on_targets: seconds spent on targets since the last entry.
        """
        sums = self._accelerator.gather(self._sums[None]).mean(0).tolist()
        self.loss, norm = (value / self._steps for value in sums)
        seconds = time.perf_counter() - self._since
        self._bar.set_postfix(loss=f"{self.loss:.4f}", refresh=False)
        if self._board is not None:
            values = {
                "loss": self.loss,
                "gradient_norm": norm,
                "learning_rate": rate,
                "images_per_second": self._steps * self._batch / seconds,
                "share_of_time_on_targets": on_targets / seconds,
            }
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        self._begin()


@contextlib.contextmanager
def diary(
    accelerator: Any, folder: Path, *, first: int, last: int, batch: int, progress: bool
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
        yield Diary(accelerator, board, stack.enter_context(bar), batch)


class Stopwatch:
    """Seconds spent in a block, without making a GPU wait for the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Adds the time of the block."""
        if self._cuda:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            yield
            pair[1].record()
            self._events.append(pair)
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call."""
        if self._events:
            torch.cuda.synchronize()
        total = self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        self._seconds = 0.0
        self._events.clear()
        return total
