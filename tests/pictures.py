"""Small image files and sources for the tests, written by hand where Pillow cannot write them."""

import io
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image


def noise(height, width, channels=3, seed=0):
    """uint8 (H, W, C), or (H, W) for one channel: no two neighbours alike, no symmetry."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image, kind="PNG", **options):
    """The bytes of an image file."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(rows, width, depth, colour, *chunks):
    """A PNG from packed rows of bytes; `chunks` (name, content) go before the pixels."""
    head = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    parts = [(b"IHDR", head), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*part) for part in parts)


def png_chunk(name, content):
    crc = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def write_tree(root, files):
    """Writes {path: bytes} below `root`, in the order given."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def write_zip(path, files, method=zipfile.ZIP_STORED):
    """Writes {name or ZipInfo: bytes} as a zip."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def class_files(count=12, size=8, classes=("cat", "dog", "emu"), kind="png", seed=0):
    """{class/number.png: bytes} of random RGB images, the classes taking turns."""
    return {
        f"{classes[i % len(classes)]}/{i:04d}.{kind}": saved(noise(size, size, seed=(seed, i)))
        for i in range(count)
    }
