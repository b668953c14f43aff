"""One step of training, and the state it changes.

Everything random in step s of process r is drawn from (seed, s, r) alone: a run that stops and
resumes takes the same steps as one that never stopped.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnflow import checkpoint as checkpoints
from nnflow.batches import Batch, Batches, seed_of, supply
from nnflow.checkpoint import RunRecord
from nnflow.diary import Stopwatch
from nnflow.errors import CheckpointError, DegradedWarning
from nnflow.files import shown
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher
from nnflow.unet import LearnedVelocity, newest_checkpoint

_AGREE_EVERY = 10  # steps between two questions to the other processes whether to stop


@dataclass(frozen=True)
class Step:
    """What one step says of itself, without waiting for the device.

    Attributes:
        loss: of this process.
        norm: of the gradient, before clipping.
        estimates: sums of a `Tally` over the estimates behind its targets.
    """

    loss: Float[Tensor, ""]
    norm: Float[Tensor, ""]
    estimates: Float[Tensor, " s"]


class Trainer:
    """The state of a run, and one step of it."""

    def __init__(
        self,
        accelerator: Any,
        store: ImageStore,
        matcher: EmpiricalFlowMatcher,
        network: LearnedVelocity,
        record: RunRecord,
        run: Path,
    ) -> None:
        self.accelerator = accelerator
        self.record, self.config, self.run = record, record.config, run
        self.device: torch.device = accelerator.device
        self.batches = Batches(
            store,
            matcher,
            self.config,
            size=self.config.batch // accelerator.num_processes,
            rank=accelerator.process_index,
            device=self.device,
        )
        self.waiting = Stopwatch(self.device)  # of the network, for batches
        self.network = network.to(self.device).train()
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        adam = torch.optim.Adam(network.unet.parameters(), lr=self.config.learning_rate)
        self.parallel, self.optimizer = accelerator.prepare(network, adam)
        self.step = 0
        self._batch_of: Callable[[int], Batch] = self.batches.make
        self.failed = torch.zeros((), device=self.device)  # first step whose loss was not finite

    def restore(self) -> None:
        """Goes to the newest checkpoint, where there is one."""
        place = newest_checkpoint(self.run)
        if place is None:
            return
        self.step, extra = checkpoints.load(
            place, network=self.network, ema=self.ema, optimizer=self.optimizer
        )
        if self.accelerator.scaler is not None and extra.get("scaler"):
            self.accelerator.scaler.load_state_dict(extra["scaler"])
        before, now = extra.get("processes"), self.accelerator.num_processes
        if before != now:
            warnings.warn(
                f"the run was trained by {before} processes and goes on with {now}: its batches "
                "will differ from those of an uninterrupted run",
                DegradedWarning,
                stacklevel=3,
            )

    def save(self) -> None:
        """Writes a checkpoint, unless the weights are already worthless."""
        self.check()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoints.save(
                self.run,
                step=self.step,
                network=self.network,
                ema=self.ema,
                optimizer=self.optimizer.optimizer,
                record=self.record,
                extra={
                    "processes": self.accelerator.num_processes,
                    "scaler": None if scaler is None else scaler.state_dict(),
                },
            )
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def supplied(self) -> Iterator[None]:
        """Within the block the batches of the steps that are left come as the config says: ahead or not."""
        wanted = self.config.prefetch
        ahead = wanted == "on" or (wanted == "auto" and self.device.type == "cuda")
        with supply(self.batches, range(self.step, self.config.steps), ahead=ahead) as batch_of:
            self._batch_of = batch_of
            yield

    def advance(self) -> Step:
        """Takes one step."""
        config = self.config
        with self.waiting.running():
            batch = self._batch_of(self.step)
        # for dropout; a batch has a generator of its own
        torch.manual_seed(seed_of(config.seed, self.step, self.accelerator.process_index))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = functional.mse_loss(self.parallel(batch.xt, batch.t, batch.labels), batch.ut)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        largest = config.clip or torch.inf
        norm = self.accelerator.clip_grad_norm_(self.parallel.parameters(), largest)
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
        averaged, latest = list(self.ema.parameters()), list(self.network.parameters())
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(averaged, latest, self.step)
        self.step += 1
        # A loss scaler meets infinite gradients now and then and skips them; others may not.
        fine = loss.detach().isfinite()
        if self.accelerator.scaler is None:
            fine = fine & norm.isfinite()
        first = (~fine) & (self.failed == 0)
        self.failed = torch.where(first, torch.full_like(self.failed, self.step), self.failed)
        return Step(loss.detach(), norm.detach(), batch.estimates)

    def rate(self) -> float:
        """Adam's step size in this step: linear warm-up, then constant."""
        ramp = min(1.0, (self.step + 1) / max(1, self.config.warmup))
        return self.config.learning_rate * ramp

    def check(self) -> None:
        """Stops the run in every process when a loss in any of them was not finite.

        Raises:
            CheckpointError: naming the step; the newest checkpoint is from before it.
        """
        failed = int(self.accelerator.gather(self.failed.reshape(1)).max())
        if failed:
            place = newest_checkpoint(self.run)
            kept = f"{shown(place)} is kept" if place else "no checkpoint had been written"
            raise CheckpointError(
                f"step {failed}: the loss or its gradient is not finite; {kept}; start a run with "
                "a smaller learning_rate, a longer warmup, or mixed_precision no or bf16"
            )

    def stop_agreed(self, wanted: bool) -> bool:
        """Whether any process wants to stop; all of them answer alike, at the same step."""
        if self.accelerator.num_processes == 1:
            return wanted
        if self.step % _AGREE_EVERY:
            return False
        votes = torch.tensor([float(wanted)], device=self.device)
        return bool(self.accelerator.gather(votes).max() > 0)
