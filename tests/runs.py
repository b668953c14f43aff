"""What the tests of training share: thirteen images, the smallest of runs, and looks into its folder."""

import textwrap
import threading

import torch
from safetensors.torch import load_file
from stores import store_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nnflow import training
from nnflow.config import resolve
from nnflow.targets import EmpiricalFlowMatcher

PARTS = ["unet/diffusion_pytorch_model.safetensors", "ema/diffusion_pytorch_model.safetensors"]
PARTS += ["optimizer.safetensors"]

# Everything random is on: M draws per target, flips, dropout.
TINY = {
    "target": "efm-m",
    "samples": 5,
    "flip": True,
    "dropout": 0.2,
    "channels": (8,),
    "head_dim": 8,
    "attention": (),
    "batch": 6,
    "warmup": 4,
    "steps": 6,
    "checkpoint_every": 2,
    "keep": 9,
    "log_every": 2,
    "sample_every": 0,
    "class_conditional": True,
}


def tiny(**knobs):
    return resolve("digits", TINY | knobs)


def same(one, other, *parts):
    for part in parts or PARTS:
        mine, theirs = load_file(one / part), load_file(other / part)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), (part, name)


def differ(one, other):
    mine, theirs = load_file(one / PARTS[0]), load_file(other / PARTS[0])
    return any(not torch.equal(value, theirs[name]) for name, value in mine.items())


def points(run, name="loss"):
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def script(store, run, extra):
    """Source of a program that trains `straight`'s run in `run`."""
    return textwrap.dedent(f"""
        import os, signal, sys, torch
        torch.set_num_threads({torch.get_num_threads()})
        from nnflow import trainer, training
        from nnflow.config import resolve
        from nnflow.store import ImageStore
        store = ImageStore.open({str(store.folder)!r})
        config = resolve("digits", {TINY!r})
        run = {str(run)!r}
    """) + textwrap.dedent(extra)


class Spy(EmpiricalFlowMatcher):
    """A matcher that remembers what it is asked and answers with a given target."""

    def __init__(self, answer=None):
        self.asked, self.answer = [], answer

    def sample_location_and_conditional_flow(self, x0, x1, t, **rest):
        self.asked.append({"x0": x0, "x1": x1, "t": t} | rest)
        xt = x0 + t[:, None, None, None] * (x1 - x0)
        ut = x1 - x0
        return t, xt, ut if self.answer is None else self.answer(len(self.asked), ut)


def spied(monkeypatch, answer=None):
    spy = Spy(answer)
    monkeypatch.setattr(training, "matcher_of", lambda *_: spy)
    return spy


def thirteen(folder):
    """Images of two classes."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (13, 1, 4, 4), generator=generator).byte()
    return store_of(pixels, folder, classes=["a"] * 5 + ["b"] * 8)


def workers():
    """Threads that make targets."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("nnflow-targets")]
