"""One step of training, and the state it changes.

Everything random in step s of process r is drawn from (seed, s, r) alone: a run that stops and
resumes takes the same steps as one that never stopped.
"""

import copy
import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn

from nnflow import checkpoint as checkpoints
from nnflow.checkpoint import RunRecord
from nnflow.diary import Stopwatch
from nnflow.errors import CheckpointError, DegradedWarning
from nnflow.files import shown
from nnflow.store import ImageStore
from nnflow.targets import EmpiricalFlowMatcher
from nnflow.unet import LearnedVelocity, newest_checkpoint

_AGREE_EVERY = 10  # steps between two questions to the other processes whether to stop


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
        self.accelerator, self.store, self.matcher = accelerator, store, matcher
        self.record, self.config, self.run = record, record.config, run
        self.device: torch.device = accelerator.device
        self.batch = self.config.batch // accelerator.num_processes
        self.network = network.to(self.device).train()
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        adam = torch.optim.Adam(network.unet.parameters(), lr=self.config.learning_rate)
        self.parallel, self.optimizer = accelerator.prepare(network, adam)
        self.targets = Stopwatch(self.device)
        self.step = 0
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

    def advance(self) -> tuple[Tensor, Tensor]:
        """One step; the loss of this process and the norm of the gradient before clipping."""
        config = self.config
        seed = seed_of(config.seed, self.step, self.accelerator.process_index)
        torch.manual_seed(seed)  # for dropout; the batch has a generator of its own
        t, xt, ut, labels = self._batch(torch.Generator().manual_seed(seed ^ 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = functional.mse_loss(self.parallel(xt, t, labels), ut)
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
        return loss.detach(), norm.detach()

    def _batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """t, x_t, the target there, and the labels the network is told.

        Drawn on the CPU, so that a run sees the same batches on any device.
        """
        size, place = self.batch, self.device
        ids = torch.randint(len(self.store), (size,), generator=generator)
        x1 = self.store.images(ids)
        x0 = torch.randn(x1.shape, generator=generator)
        t = torch.rand(size, generator=generator)
        flipped = None
        if self.config.flip:
            flipped = torch.rand(size, generator=generator) < 0.5
            x1 = torch.where(flipped[:, None, None, None], x1.flip(-1), x1)
            flipped = flipped.to(place)
        labels = self.store.labels[ids].to(place) if self.config.class_conditional else None
        with self.targets.running():
            t, xt, ut = self.matcher.sample_location_and_conditional_flow(
                x0.to(place),
                x1.to(place),
                t.to(place),
                ids=ids.to(place),
                labels=labels,
                flipped=flipped,
                generator=generator,
            )
        return t, xt, ut, labels

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


def seed_of(seed: int, step: int, rank: int) -> int:
    """A seed for what is random in one step of one process; unlike seed + step, runs share none."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
