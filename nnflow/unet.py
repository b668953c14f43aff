"""The learned velocity: a U-Net of diffusers behind the call that every field answers.

    u_theta(x, t) = UNet2DModel(x, 1000 t)        t = 0 noise, t = 1 data

A network on disk is a folder that `UNet2DModel.from_pretrained` opens: config.json and safetensors.
Its config alone says which images it is for: `sample_size` is their height and width.
"""

import importlib
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from nnflow.config import TrainConfig
from nnflow.errors import CheckpointError, InputError, MissingExtraError, StoreError
from nnflow.files import file_mark, read_json, shown
from nnflow.velocity import Velocity

# The sinusoids of UNet2DModel have angular frequencies from 1 down to 1e-4, made for DDPM's 1,000
# steps. At t itself all but the first are constant on [0, 1]. At 1000 t the periods run from .006
# to 63 in t: fine enough for CIFAR-10's collapse onto one image, 57 effective images at t = .12
# and 8 at .15.
TIME_SCALE = 1000.0

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name diffusers gives and looks for
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"  # written last, with a mark of each of FILES
FILES = (
    *(f"{part}/{name}" for part in ("unet", "ema") for name in ("config.json", WEIGHTS)),
    OPTIMIZER,
)
_TIME_SLACK = 1e-5  # a float32 clock of 1,000 steps ends at 1 + 8e-6


def train_extra(module: str) -> ModuleType:
    """`module` of the extra `train`.

    Raises:
        MissingExtraError: not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise MissingExtraError(
            f"the network needs {package}, which cannot be imported ({shown(error)}); "
            "run: pip install 'nnflow[train]'"
        ) from error


class LearnedVelocity(nn.Module, Velocity):
    """A trained U-Net as a velocity field; call it with x and t like any other field.

    Attributes:
        unet: diffusers' UNet2DModel.
        shape: (C, H, W) of the images it is for. Sides that its levels cannot halve are padded with
            zeros on the way in and cropped on the way out.
        classes: how many classes it was told apart; 0 for a network that takes no label.
        config: what it was trained with, where that is known.
    """

    def __init__(self, unet: nn.Module, config: TrainConfig | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.config = config
        known: Any = unet.config
        self.shape: tuple[int, int, int] = (known.in_channels, *_pair(known.sample_size))
        self.classes: int = known.num_class_embeds or 0
        step = 2 ** (len(known.block_out_channels) - 1)
        spare = [-side % step for side in self.shape[1:]]
        self._margin = tuple(s for extra in spare[::-1] for s in (extra // 2, extra - extra // 2))

    @classmethod
    def open(
        cls, folder: str | Path, *, ema: bool = True, device: torch.device | str | None = None
    ) -> "LearnedVelocity":
        """The network in `folder`, ready to be asked: eval mode, no gradients for its weights.

        Args:
            folder: a run (its newest checkpoint is taken), a checkpoint, or a folder written by
                `UNet2DModel.save_pretrained`.
            ema: the averaged weights rather than the last ones.
            device: by default CUDA where there is one, else the CPU.

        Raises:
            CheckpointError: nothing to open there, or a file is truncated, foreign or another's.
            MissingExtraError: diffusers is not installed.
        """
        place = Path(folder)
        checkpoint = newest_checkpoint(place)
        if checkpoint is None and (place / STATE).is_file():
            checkpoint = place
        if checkpoint is None:
            network = cls(read_unet(place))
        else:
            state, name = read_state(checkpoint), "ema" if ema else "unet"
            check_files(checkpoint, state, inside=name)
            network = cls(read_unet(checkpoint / name), state["config"])
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return network.to(where).eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor | float, label: Tensor | int | None = None) -> Tensor:
        """Velocity at `x`: float32 (B, C, H, W), in pixels of [-1, 1] per unit of time.

        Args:
            x: float32 (B, C, H, W).
            t: in [0, 1], a number or (B,).
            label: int64 (B,) or one number, in [0, classes); for class-conditional networks only.

        Raises:
            InputError: another shape, type or device, NaN, a time outside [0, 1], a label missing,
                superfluous or out of range. Values are not looked at in training mode.
        """
        self._check_images(x)
        t = self._times(x, t)
        classes = self._labels(x, label)
        height, width = self.shape[1:]
        left, _, top, _ = self._margin
        inside = functional.pad(x, self._margin).to(self.unet.dtype)  # type: ignore[arg-type]
        (out,) = self.unet(inside, t * TIME_SCALE, class_labels=classes, return_dict=False)
        return out[..., top : top + height, left : left + width].to(x.dtype)

    @property
    def device(self) -> torch.device:
        """Where queries must be."""
        return next(self.parameters()).device

    def _check_images(self, x: Tensor) -> None:
        wanted = "(B, {}, {}, {})".format(*self.shape)
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise InputError(f"x has shape {tuple(x.shape)}: the network takes {wanted}")
        if x.dtype != torch.float32:
            raise InputError(f"x is {_short(x.dtype)}: wanted float32 in [-1, 1]; convert it first")
        if x.device != self.device:
            raise InputError(f"x is on {x.device}, the network on {self.device}; move one of them")
        if not self.training and not bool(x.isfinite().all()):
            raise InputError("x holds NaN or infinity: wanted finite pixels")

    def _times(self, x: Tensor, t: Tensor | float) -> Tensor:
        """`t` as float32 (B,), on the device of `x`."""
        times = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        if times.ndim and tuple(times.shape) not in ((1,), (len(x),)):
            raise InputError(
                f"t has shape {tuple(times.shape)}: wanted one number, or one per image ({len(x)},)"
            )
        if not self.training and not bool(((times >= -_TIME_SLACK) & (times <= 1 + _TIME_SLACK)).all()):
            raise InputError(
                f"t reaches from {float(times.min()):g} to {float(times.max()):g}: wanted [0, 1]; "
                "an adaptive solver of torchdiffeq oversteps unless options={'step_t': [1.0]}"
            )
        return times.expand(len(x))

    def _labels(self, x: Tensor, label: Tensor | int | None) -> Tensor | None:
        if label is None:
            if self.classes:
                raise InputError(f"the network is class-conditional: give label=, 0 to {self.classes - 1}")
            return None
        if not self.classes:
            raise InputError("the network was trained without classes: leave out label=")
        labels = torch.as_tensor(label, device=x.device)
        if labels.dtype != torch.int64 or (labels.ndim and tuple(labels.shape) not in ((1,), (len(x),))):
            raise InputError(
                f"label is {_short(labels.dtype)} {tuple(labels.shape)}: wanted int64 ({len(x)},)"
            )
        if not self.training and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise InputError(
                f"label {int(labels.min())} to {int(labels.max())}: wanted 0 to {self.classes - 1}"
            )
        return labels.expand(len(x))


def build(config: TrainConfig, shape: tuple[int, int, int], classes: int = 0) -> LearnedVelocity:
    """A fresh network for images of `shape` (C, H, W), its weights drawn from `config.seed`.

    Args:
        config: widths, attention, dropout; `class_conditional` decides whether `classes` counts.
        shape: (C, H, W).
        classes: how many there are.

    Raises:
        InputError: a class-conditional network without classes, or sides below one pixel.
        MissingExtraError: diffusers is not installed.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise InputError(f"shape {tuple(shape)}: wanted (channels, height, width), each at least 1")
    if config.class_conditional and classes < 1:
        raise InputError(
            "class_conditional, but the images have no classes; index a folder with one folder "
            "per class, or leave it out"
        )
    model = train_extra("diffusers").UNet2DModel
    levels = len(config.channels)
    side = -(-max(shape[1:]) // 2 ** (levels - 1)) * 2 ** (levels - 1)  # as padded
    attends = [side >> level in config.attention for level in range(levels)]
    widest = min(32, min(config.channels) // 4)
    shared = math.gcd(*config.channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        unet = model(
            sample_size=tuple(shape[1:]),
            in_channels=shape[0],
            out_channels=shape[0],
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            block_out_channels=config.channels,
            layers_per_block=config.blocks,
            attention_head_dim=config.head_dim,
            # Four channels or more per group: group norm over one erases that channel's mean.
            norm_num_groups=max(g for g in range(1, widest + 1) if shared % g == 0),
            dropout=config.dropout,
            num_class_embeds=classes if config.class_conditional else None,
        )
    # A network that starts at u = 0 starts at the loss of the best constant for centred data.
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return LearnedVelocity(unet, config)


def newest_checkpoint(run: Path) -> Path | None:
    """The last checkpoint written whole in the folder of a run; None where there is none."""
    found = run.glob("checkpoints/step-*") if run.is_dir() else ()
    whole = [place for place in found if re.fullmatch(r"step-\d{8}", place.name)]
    return max(whole, key=lambda place: place.name, default=None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, its `config` as a TrainConfig.

    Raises:
        CheckpointError: absent, truncated, or not of nnflow.
    """
    place = checkpoint / STATE
    try:
        state = read_json(place, "the state of a checkpoint")
        state["config"] = TrainConfig.from_json(state["config"])
        if not isinstance(state["files"], dict):
            raise TypeError("files")
        state["step"], state["adam_steps"] = int(state["step"]), int(state["adam_steps"])
    except StoreError as error:
        raise CheckpointError(f"{error}; {_remedy(checkpoint)}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{shown(place)}: no state of a checkpoint ({_line(error)}); {_remedy(checkpoint)}"
        ) from error
    return state


def check_files(checkpoint: Path, state: dict[str, Any], *, inside: str = "") -> None:
    """Compares the files of a checkpoint with the marks that were written beside them.

    Args:
        checkpoint: the folder.
        state: of `read_state`.
        inside: look only below this folder of it.

    Raises:
        CheckpointError: a file is missing, cut or another's.
    """
    for name in FILES:
        place = checkpoint / name
        if not name.startswith(inside):
            continue
        try:
            found = file_mark(place)
        except OSError as error:
            cause = (error.strerror or str(error)).lower()
            raise CheckpointError(f"{shown(place)}: {cause}; {_remedy(checkpoint)}") from error
        if found != state["files"].get(name):
            raise CheckpointError(
                f"{shown(place)}: {found['bytes']} bytes that are not those written with "
                f"{STATE}; {_remedy(checkpoint)}"
            )


def read_unet(folder: Path) -> nn.Module:
    """The UNet2DModel that `save_pretrained` wrote to `folder`; every weight from the file.

    Raises:
        CheckpointError: a file is missing, truncated, foreign, or does not fit the other.
        MissingExtraError: diffusers is not installed.
    """
    model = train_extra("diffusers").UNet2DModel
    place = folder / "config.json"
    try:
        settings = read_json(place, "the config of a UNet2DModel")
    except StoreError as error:
        raise CheckpointError(f"{error}; name a run, one of its checkpoints or its ema/") from error
    if settings.get("_class_name") != "UNet2DModel":
        kind = shown(settings.get("_class_name"))
        raise CheckpointError(f"{shown(place)}: describes {kind}, wanted a UNet2DModel")
    try:
        with torch.device("meta"):  # no memory, and no random numbers that the file would replace
            unet: Any = model.from_config(settings)
        wanted = {name: tensor.shape for name, tensor in unet.state_dict().items()}
        _pair(unet.config.sample_size)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{shown(place)}: no UNet2DModel of it ({_line(error)})") from error
    unet.load_state_dict(read_tensors(folder / WEIGHTS, wanted), strict=True, assign=True)
    network: nn.Module = unet
    return network


def read_tensors(place: Path, wanted: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, checked to be exactly those `wanted`, in float32.

    Raises:
        CheckpointError: missing, truncated, or other names, shapes or types.
    """
    try:
        found = load_file(place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{shown(place)}: not readable ({_line(error)})") from error
    if odd := sorted(set(found) ^ set(wanted)):
        which = "lacks" if odd[0] in wanted else "has an extra"
        raise CheckpointError(f"{shown(place)}: {which} {shown(odd[0])}; it is of another network")
    for name, tensor in found.items():
        if tensor.shape != wanted[name] or tensor.dtype != torch.float32:
            raise CheckpointError(
                f"{shown(place)}: {shown(name)} is {_short(tensor.dtype)} {tuple(tensor.shape)}, "
                f"wanted float32 {tuple(wanted[name])}; it is of another network"
            )
    return found


def _remedy(checkpoint: Path) -> str:
    return f"delete {shown(checkpoint.name)} to go on from the checkpoint before it"


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _line(error: Exception) -> str:
    """The first line of a message that may have many."""
    return shown((str(error) or type(error).__name__).strip().splitlines()[0])[:200]
