"""Pictures of latents: an autoencoder's decoder, as a callable or a file.

A field of latents works on values z scaling (`codec`); a decoder is asked for what the source's arrays held,
z. The field, its distances and its samples know nothing of it: it is there to look at them.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from nnflow.errors import InputError
from nnflow.files import shown
from nnflow.store import ImageStore

Decode: TypeAlias = Callable[[Tensor], Tensor]


@torch.no_grad()
def pictures_of(
    values: Float[Tensor, "S C H W"],
    store: ImageStore,
    decode: Decode | None = None,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "S c h w"]:
    """What `values`, samples or stored images, look like.

    Args:
        values: as `sample` and `store.images` give them.
        store: whose values they are.
        decode: latents (B, C, H, W), float32 as they were in the source of `store`, to grey or RGB pictures
            (B, 1 or 3, h, w) in [-1, 1]. Pixels need none.
        batch: latents decoded at once.
        device: where `decode` lives.

    Returns:
        float32 on the CPU, in [-1, 1] as far as `decode` keeps to it.

    Raises:
        InputError: latents and no decoder, pixels and one, or a decoder that returns something else.
    """
    if store.codec.of_pixels:
        if decode is not None:
            raise InputError("decode: the store holds pixels, which need no decoder; leave it out")
        return values.float().cpu()
    if decode is None:
        raise InputError("the store holds latents: wanted decode=, a callable from latents to pictures")
    found = []
    for some in values.split(batch):
        pictures = decode(some.to(device=device, dtype=torch.float32) / store.codec.scaling)
        _check(pictures, len(some))
        found.append(pictures.float().cpu())
    return torch.cat(found)


def _check(pictures: object, count: int) -> None:
    """Refuses what is not `count` pictures."""
    wanted = f"wanted float pictures ({count}, 1 or 3, h, w) in [-1, 1]"
    if not isinstance(pictures, Tensor):
        raise InputError(
            f"decode returned a {type(pictures).__name__}: {wanted}; of diffusers' autoencoders: "
            "lambda z: vae.decode(z).sample"
        )
    fits = pictures.ndim == 4 and len(pictures) == count and pictures.shape[1] in (1, 3)
    if not fits or not pictures.is_floating_point():
        raise InputError(f"decode returned {pictures.dtype} of shape {tuple(pictures.shape)}: {wanted}")
    if not bool(pictures.isfinite().all()):
        raise InputError(f"decode returned NaN or infinity: {wanted}")


def open_decoder(path: Path | str, device: torch.device | str = "cpu") -> Decode:
    """The decoder in a file: a TorchScript module, or in a .pt2 an exported program.

    Raises:
        InputError: missing, or neither of these.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{shown(path)}: no such file; wanted a decoder, TorchScript or torch.export's .pt2")
    try:
        if path.suffix == ".pt2":
            exported: Decode = torch.export.load(path).module().to(device)
            return exported
        with warnings.catch_warnings():
            # Deprecated in favour of torch.export, and what decoders are passed around as.
            warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
            scripted: Decode = torch.jit.load(path, map_location=device)
            return scripted
    except Exception as error:
        # Either reader answers foreign bytes with any of a dozen exceptions.
        cause = shown((str(error) or type(error).__name__).strip().splitlines()[0])[:200]
        raise InputError(
            f"{shown(path)}: not a decoder ({cause}); save one by torch.jit.script(module).save(FILE), or "
            "by torch.export"
        ) from error
