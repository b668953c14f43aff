"""Writes scikit-learn's digits, 1,797 grey 8x8 images, as a folder of PNG files by class.

    scripts/make_digits.py [OUT] [--held-out K]

    OUT/train/3/0013.png      image 13 of load_digits, a three
    OUT/held-out/3/0045.png   with --held-out K only: every K-th image of each class, in order

The same command writes the same bytes, and leaves files alone that already hold them. With another
K the images move: none is ever in both folders. The digits (Alpaydin and Kaynak 1998) come with
scikit-learn: nothing is downloaded.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

DIGITS = range(10)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("data/digits"), help="default: data/digits")
    parser.add_argument(
        "--held-out",
        type=int,
        default=0,
        metavar="K",
        help="move every K-th image of each class to OUT/held-out; 0, the default: none",
    )
    options = parser.parse_args(arguments)
    if options.held_out < 0 or options.held_out == 1:
        parser.error(f"--held-out {options.held_out}: wanted 0 (none) or 2 and more (every K-th)")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        parser.error("scikit-learn is not installed; pip install 'nnflow[demo]'")
    digits = load_digits()
    files = layout(digits.images, digits.target, held_out=options.held_out)
    try:
        written = write(files, options.out)
    except OSError as error:
        parser.error(f"writing {error.filename or options.out!s}: {error.strerror}; name another OUT")
    train = sum(path.parts[0] == "train" for path in files)
    print(f"{options.out}: {train} training and {len(files) - train} held-out digits, {written} new")
    return 0


def layout(images: np.ndarray, labels: np.ndarray, *, held_out: int) -> dict[Path, bytes]:
    """The PNG files, by path below OUT, of `images` (n, 8, 8) with values 0 to 16."""
    seen = dict.fromkeys(DIGITS, 0)
    files = {}
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        seen[label] += 1
        part = "held-out" if held_out and seen[label] % held_out == 0 else "train"
        files[Path(part, str(label), f"{number:04d}.png")] = png(image)
    return files


def png(image: np.ndarray) -> bytes:
    """A grey PNG of `image`, whose 0 to 16 become 0 to 255."""
    buffer = io.BytesIO()
    Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write(files: dict[Path, bytes], out: Path) -> int:
    """Makes OUT hold `files` and no other that this script may have put there; counts the new."""
    names = {path.name for path in files}
    for part in ("train", "held-out"):
        for digit in DIGITS:
            for found in sorted((out / part / str(digit)).glob("*.png")):
                if found.name in names and found.relative_to(out) not in files:
                    found.unlink()
    written = 0
    for path, data in files.items():
        target = out / path
        if target.is_file() and target.read_bytes() == data:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        written += 1
    return written


if __name__ == "__main__":
    sys.exit(main())
