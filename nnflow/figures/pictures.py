"""Small images within JSON, without loss: a picture strip is drawn from the JSON alone.

Each image is a PNG in base64; what lies outside [-1, 1] is clamped and values are rounded to 1/127.5, as on
any screen.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from nnflow.errors import StoreError
from nnflow.store import to_float, to_uint8


def to_text(images: Float[Tensor, "S C H W"]) -> list[str]:
    """Each of `images` in [-1, 1], grey or RGB, as text."""
    written = []
    for pixels in to_uint8(images.detach().cpu()):
        array = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
        file = io.BytesIO()
        Image.fromarray(array.numpy()).save(file, "PNG", optimize=True)
        written.append(base64.b64encode(file.getvalue()).decode("ascii"))
    return written


def from_text(texts: Sequence[str]) -> Float[Tensor, "S C H W"]:
    """What `to_text` wrote, in [-1, 1].

    Raises:
        StoreError: text that is no such image.
    """
    images = []
    for text in texts:
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
                array = np.array(image)
        except (OSError, ValueError, SyntaxError) as error:
            raise StoreError("an image in the results is damaged; measure the figure again") from error
        images.append(torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
    return to_float(torch.stack(images))
