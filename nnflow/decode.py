"""An image file's bytes, or its pixels, to uint8 (C, H, W) of a stated size and number of channels.

Upright (EXIF), composed on a background where transparent, 16-bit grey scaled to 8 by 257, cut to
the middle square, resampled by LANCZOS. An opaque 8-bit image that has the size already keeps its
values bit for bit. Colours are taken as stored: embedded colour profiles are not applied.

A JPEG at least 4 times too large is halved (quartered, ...) while it is decoded, by libjpeg's scaled
inverse DCT, and LANCZOS does the rest, always a reduction by 2 or more. Measured on Imagenette,
against decoding it whole: 224 pixels to 32, 0.27 instead of 0.53 ms an image and 0.6 grey levels of
difference (root mean square; 1 value in 100 differs by more than 2); 500 x 375 to 64, 0.74 instead
of 1.58 ms and 0.6. Leaving LANCZOS less than a factor of 2 would save another third, at 2.0.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageColor,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from nnflow.errors import InputError
from nnflow.files import shown
from nnflow.sources import UnreadableImageError

MAX_PIXELS = 80_000_000  # of one image before scaling; from 89,478,485 on Pillow itself warns
MAX_SIZE = 4096

# By content, not by name, and called directly: Image.open would warn of large images, and try
# formats that start other programs (EPS).
_OPENERS: tuple[tuple[bytes, Callable[[io.BytesIO], Image.Image]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"GIF87a", GifImagePlugin.GifImageFile),
    (b"GIF89a", GifImagePlugin.GifImageFile),
    (b"II\x2a\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0\x2a", TiffImagePlugin.TiffImageFile),
    (b"II\x2b\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0\x2b", TiffImagePlugin.TiffImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
    (b"P", PpmImagePlugin.PpmImageFile),
)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation: what makes it upright
_DEEP_GREY = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


class _OtherPixelsError(ValueError):
    """A sound image, of pixels that are not converted."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """Turns every image of a store into one shape; equal decoders give equal bytes."""

    size: int  # height and width
    grey: bool = False
    background: str = "#ffffff"  # under transparent pixels; CSS name or #rrggbb, kept as #rrggbb

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_SIZE:
            raise InputError(f"size {self.size!r}: wanted a whole number from 1 to {MAX_SIZE}")
        try:
            colour = ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(_no_colour(self.background)) from error
        if len(colour) != 3:
            raise InputError(_no_colour(self.background))
        object.__setattr__(self, "background", "#{:02x}{:02x}{:02x}".format(*colour))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what `decode` returns."""
        return (1 if self.grey else 3, self.size, self.size)

    def decode(
        self, content: bytes | UInt8[np.ndarray, "H0 W0 *C0"], path: str
    ) -> UInt8[np.ndarray, "C H W"]:
        """The image in `content`, a file's bytes or (H, W) grey or (H, W, 3) RGB; `path` only names it.

        Raises:
            UnreadableImageError: empty, no image of a known format, cut off, or far too large.
        """
        if isinstance(content, np.ndarray):
            return self._fitted(Image.fromarray(content))
        if not content:
            raise UnreadableImageError(path, "an empty file")
        try:
            image = _open(content, path)
            whole = image.size
            if isinstance(image, JpegImagePlugin.JpegImageFile):
                image.draft(None, (2 * self.size, 2 * self.size))
            _load(image, content)
            flat = _flat(image, self.background)
            if image.size != whole:
                flat = _shrunk(flat, whole, self.size)
            return self._fitted(_turned(flat, _orientation(image)))
        except UnreadableImageError:
            raise
        except _OtherPixelsError as error:
            raise UnreadableImageError(path, str(error)) from error
        except Exception as error:
            # Pillow's decoders answer hostile bytes with any of a dozen exceptions, among them
            # SyntaxError, struct.error, ValueError for large text chunks and IndexError.
            cause = shown(str(error) or type(error).__name__)
            raise UnreadableImageError(path, f"damaged or cut off ({cause})") from error

    def _fitted(self, image: Image.Image) -> UInt8[np.ndarray, "C H W"]:
        """The middle square of an opaque image, at this size."""
        mode = "L" if self.grey else "RGB"
        if image.mode != mode:
            image = image.convert(mode)
        width, height = image.size
        short = min(width, height)
        if width != height:
            # Cut before scaling: the filter must not see what is cut away.
            left, top = (width - short) // 2, (height - short) // 2
            image = image.crop((left, top, left + short, top + short))
        if short != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if self.grey else pixels.transpose(2, 0, 1)


def image_size(content: bytes | UInt8[np.ndarray, "H0 W0 *C0"], path: str) -> tuple[int, int]:
    """Width and height of what `Decoder.decode` takes, as stored; of a file only the head is looked at.

    Raises:
        UnreadableImageError: empty, or no image of a known format.
    """
    if isinstance(content, np.ndarray):
        return content.shape[1], content.shape[0]
    if not content:
        raise UnreadableImageError(path, "an empty file")
    try:
        return _open(content, path).size
    except UnreadableImageError:
        raise
    except Exception as error:  # as in `decode`
        cause = shown(str(error) or type(error).__name__)
        raise UnreadableImageError(path, f"damaged or cut off ({cause})") from error


def _no_colour(text: object) -> str:
    return f"background {shown(repr(text))}: wanted a colour name such as white, or #rrggbb"


def _open(content: bytes, path: str) -> Image.Image:
    """The first frame, not decoded yet."""
    opener = next((make for magic, make in _OPENERS if content.startswith(magic)), None)
    if opener is None:
        raise UnreadableImageError(path, "not an image of a known format, whatever its name says")
    image = opener(io.BytesIO(content))
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            path, f"{width} x {height} pixels; wanted at most {MAX_PIXELS:,} in one image"
        )
    return image


def _load(image: Image.Image, content: bytes) -> None:
    """Decodes. PNG names its transparent colour in the file's depth; Pillow scales only the pixels."""
    depth = content[24] if image.format == "PNG" else 8
    image.load()
    colour = image.info.get("transparency")
    if isinstance(colour, int) and image.mode == "L" and depth < 8:
        image.info["transparency"] = colour * {1: 255, 2: 85, 4: 17}[depth]
    elif isinstance(colour, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _flat(image: Image.Image, background: str) -> Image.Image:
    """`image` as opaque L or RGB."""
    if image.mode in _DEEP_GREY:
        image = _eight_bits(image)
    if image.mode in _ALPHA or (image.mode in _OPAQUE and "transparency" in image.info):
        if image.mode == "La":
            image = image.convert("LA")
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, background), over).convert("RGB")
    if image.mode not in _OPAQUE:
        raise _OtherPixelsError(f"pixels of type {image.mode}; wanted grey, RGB, CMYK or a palette")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 0 .. 65535 as 0 .. 255, rounded: 257 * v becomes v."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError(f"grey values from {values.min()} to {values.max()}; wanted 0 to 65535 (16 bits)")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _shrunk(image: Image.Image, whole: tuple[int, int], size: int) -> Image.Image:
    """The middle square of a JPEG decoded at a fraction of its `whole` size, at `size`.

    The same square as of the whole image, whose edges fall between the pixels of this one.
    """
    scale = round(whole[0] / image.width)  # the last row and column may stand for fewer pixels
    short = min(whole)
    left, top = ((side - short) // 2 / scale for side in whole)
    right, bottom = left + short / scale, top + short / scale
    outer = (math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
    box = (left - outer[0], top - outer[1], right - outer[0], bottom - outer[1])
    return image.crop(outer).resize((size, size), Image.Resampling.LANCZOS, box)


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 .. 8; 1 (upright) where there is none or it cannot be read.

    Read here and not by Image.getexif, which warns of broken entries it does not need.
    """
    exif = image.info.get("exif")
    # Pillow turns TIFF on loading, and names no "exif" there.
    if not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")  # JPEG has it, PNG and WebP have not
    if exif[:2] not in (b"II", b"MM"):
        return 1
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    start = number(4, 4)
    for entry in range(start + 2, start + 2 + 12 * number(start, 2), 12):
        if number(entry, 2) == 0x0112:
            return number(entry + 8, 2)
    return 1
