"""Every knob of a training run, its range, and sets of values that belong together.

The command line makes one option of each field: `metadata` holds its help, its range (`low`,
`high`, both included) or its `choices`. The values a run was made with are saved beside it, and a
run is only ever continued with the same ones.
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from nnflow.errors import InputError
from nnflow.files import shown
from nnflow.memory import parse_bytes

_TARGETS = ("cfm", "efm-m", "efm", "efm-unbiased")
_LARGEST = 2**63 - 1

# These change what is written down on the way and when, never the weights, so a resumed run may change them.
BOOKKEEPING = frozenset({"checkpoint_every", "keep", "sample_every", "log_every", "prefetch"})


def _knob(
    default: Any,
    text: str,
    *,
    low: int | float | None = None,
    high: int | float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    metadata = {"help": text, "low": low, "high": high, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a network is trained; the defaults are the preset `cifar10`.

    Raises:
        InputError: a value of another type or outside its range.
    """

    target: str = _knob("efm", "what the network regresses on", choices=_TARGETS)
    samples: int = _knob(128, "M of efm-m: x1 and M - 1 uniform draws", low=1)
    k: int = _knob(100, "neighbours of the nearest field", low=1)
    field: str = _knob(
        "near-and-far",
        "the field behind efm; efm-unbiased takes nearest where this is exact",
        choices=("exact", "nearest", "near-and-far"),
    )
    tolerance: float = _knob(
        0.01, "relative velocity error of near-and-far, by the index's calibration", low=1e-6, high=1.0
    )
    memory: str = _knob("1GiB", "working memory of the target, e.g. 512MiB")
    prefetch: str = _knob(
        "auto",
        "make targets beside the network, in a thread; auto does on a GPU, not on the cores it would share",
        choices=("auto", "on", "off"),
    )

    steps: int = _knob(500_000, "optimiser steps in all", low=1, high=99_999_999)
    batch: int = _knob(128, "images per step, over all processes", low=1)
    learning_rate: float = _knob(2e-4, "Adam's step size after warm-up", low=1e-12, high=1.0)
    warmup: int = _knob(5_000, "steps over which the step size grows linearly from 0", low=0)
    ema_decay: float = _knob(
        0.9999, "decay of the averaged weights; (1 + s) / (10 + s) at step s while that is less",
        low=0.0, high=0.9999999,
    )  # fmt: skip
    clip: float = _knob(1.0, "largest norm of a gradient; 0 clips nothing", low=0.0)
    mixed_precision: str = _knob("no", "of the network's sums", choices=("no", "fp16", "bf16"))

    flip: bool = _knob(True, "mirror half of the images, in data and target alike")
    class_conditional: bool = _knob(False, "tell the network the class, and target that class")

    channels: tuple[int, ...] = _knob(
        (128, 256, 256, 256), "channels per level, e.g. 32,64; each level halves the image", low=8
    )
    blocks: int = _knob(2, "residual blocks per level", low=1)
    attention: tuple[int, ...] = _knob(
        (16,), "sides (pixels) of the levels with attention; the innermost always has it", low=1
    )
    head_dim: int = _knob(64, "channels per attention head; divides every entry of channels", low=1)
    dropout: float = _knob(0.1, "share of activations dropped in training", low=0.0, high=0.99)

    seed: int = _knob(0, "of weights, batches, noise, times, flips and dropout", low=0)
    checkpoint_every: int = _knob(5_000, "steps between checkpoints", low=1)
    keep: int = _knob(2, "checkpoints kept, newest first", low=1)
    sample_every: int = _knob(10_000, "steps between sample grids; 0 draws none", low=0)
    log_every: int = _knob(100, "steps between TensorBoard points", low=1)

    def __post_init__(self) -> None:
        for knob in dataclasses.fields(self):
            object.__setattr__(self, knob.name, _checked(knob, getattr(self, knob.name)))
        parse_bytes(self.memory)
        if not self.channels:
            raise InputError("channels is empty: wanted one number per level, e.g. 32,64")
        for width in self.channels:
            if width % 8:
                raise InputError(f"channels: {width} is not a multiple of 8, as group norm wants")
            if width % self.head_dim:
                raise InputError(
                    f"head_dim {self.head_dim} does not divide {width} of channels "
                    f"{_listed(self.channels)}; try {math.gcd(*self.channels)}"
                )

    def to_json(self) -> dict[str, Any]:
        """Every knob, as JSON values; `from_json` reads it back to an equal config."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The config of `values`; knobs not named keep their defaults.

        Raises:
            InputError: an unknown knob, or a value outside its range.
        """
        return resolve("cifar10", values)

    def replace(self, values: Mapping[str, Any]) -> "TrainConfig":
        """This config with `values` in place of its own.

        Raises:
            InputError: an unknown knob, or a value outside its range.
        """
        known = {knob.name: knob for knob in dataclasses.fields(self)}
        unknown = sorted(shown(name) for name in values if name not in known)
        if unknown:
            raise InputError(f"unknown knob {', '.join(unknown)}; known are {', '.join(known)}")
        return dataclasses.replace(
            self, **{name: _checked(known[name], value) for name, value in values.items()}
        )


def resolve(preset: str, overrides: Mapping[str, Any]) -> TrainConfig:
    """The preset's values with `overrides` in place of its own.

    Tuples may also be lists, or text such as "32,64".

    Raises:
        InputError: an unknown preset or knob, or a value outside its range.
    """
    if preset not in PRESETS:
        raise InputError(f"unknown preset {shown(preset)!r}; known are {', '.join(PRESETS)}")
    return PRESETS[preset].replace(overrides)


def differences(saved: TrainConfig, wanted: TrainConfig) -> str:
    """What keeps a run made with `saved` from going on with `wanted`, in one line; "" for nothing.

    More steps than before are no obstacle, nor is anything in `BOOKKEEPING`.
    """
    found = []
    for knob in dataclasses.fields(TrainConfig):
        before, now = getattr(saved, knob.name), getattr(wanted, knob.name)
        allowed = knob.name in BOOKKEEPING or (knob.name == "steps" and now > before)
        if before != now and not allowed:
            found.append(f"{knob.name} was {_listed(before)}, now {_listed(now)}")
    return "; ".join(found)


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _checked(knob: "dataclasses.Field[Any]", value: Any) -> Any:
    """`value` in the type of the knob and within its range."""
    if knob.type == tuple[int, ...]:
        return tuple(_number(knob, part, int) for part in _parts(knob.name, value))
    if knob.type is bool:
        if not isinstance(value, bool):
            raise InputError(f"{knob.name} is {shown(repr(value))}: wanted true or false")
        return value
    if knob.type is str:
        choices = knob.metadata["choices"]
        if not isinstance(value, str) or (choices and value not in choices):
            wanted = f"one of {', '.join(choices)}" if choices else "text"
            raise InputError(f"{knob.name} is {shown(repr(value))}: wanted {wanted}")
        return value
    return _number(knob, value, int if knob.type is int else float)


def _parts(name: str, value: Any) -> list[Any]:
    """The entries of a tuple knob, from a tuple, a list, or text such as "32,64"."""
    if isinstance(value, list | tuple):
        return list(value)
    try:
        return [int(part) for part in value.split(",") if part.strip()]
    except (AttributeError, ValueError) as error:
        raise InputError(f"{name} is {shown(repr(value))}: wanted whole numbers such as 32,64") from error


def _number(knob: "dataclasses.Field[Any]", value: Any, kind: type) -> Any:
    """`value` as a finite `kind` within the knob's range; a bool is no number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    low, high = knob.metadata["low"], knob.metadata["high"]
    high = _LARGEST if high is None and kind is int else high
    if not fits or (low is not None and value < low) or (high is not None and value > high):
        what = "a whole number" if kind is int else "a number"
        span = f" of at least {low}" if high in (None, _LARGEST) else f" from {low} to {high}"
        raise InputError(f"{knob.name} is {shown(repr(value))}: wanted {what}{span}")
    return kind(value)


# The recipe of arXiv 2506.03719 for CIFAR-10; one for 64x64 on a GPU; one for scikit-learn's 8x8 digits on a
# laptop. `imagenet64` has the widths of facebookresearch/flow_matching's ImageNet example (there in
# examples/image/models/model_configs.py), which are those of ADM (arXiv 2105.05233): 192 channels times 1, 2,
# 3, 4; 3 blocks; attention at a half, a quarter and an eighth of the side; 64 channels a head; Adam 1e-4.
PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        "cifar10": TrainConfig(),
        "imagenet64": TrainConfig(
            learning_rate=1e-4,
            mixed_precision="bf16",
            channels=(192, 384, 576, 768),
            blocks=3,
            attention=(32, 16, 8),
        ),
        "digits": TrainConfig(
            steps=1_600,
            batch=64,
            learning_rate=2e-3,
            warmup=100,
            ema_decay=0.995,
            field="exact",  # the one that no index is calibrated for
            flip=False,
            channels=(32, 64),
            blocks=1,
            attention=(4,),
            head_dim=32,
            dropout=0.0,
            checkpoint_every=400,
            sample_every=400,
            log_every=25,
        ),
    }
)
