"""What has been measured, part by part: a killed command goes on, a changed one repeats what changed.

    DIR/parts/NAME/PART-DIGEST.json     {"key": ..., "seconds": ..., "value": ...}, whole or absent

The digest is that of the key, and the key is all that the value depends on: settings, fingerprints of images
and weights, and the version of the experiment. Parts of other settings stay beside it, for a return to them.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnflow.errors import StoreError
from nnflow.files import disk_errors, read_json, write_json

_DIGITS = 16  # of the digest, in a file's name


class Parts:
    """The parts of one experiment, below one folder.

    Attributes:
        seconds: what the parts asked for so far took to measure, whenever that was.
        reused: how many of them were there already.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        """`about` is part of every key: the experiment and its version."""
        self.folder = folder
        self.seconds = 0.0
        self.reused = 0
        self._about = dict(about)

    def get(
        self, name: str, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """The value of part `name` for `key`: as kept, or measured now and kept.

        Args:
            name: of the part, for the file's name: letters, digits and dashes.
            key: all that the value depends on, of what JSON knows.
            measure: what gives the value, of what JSON knows.

        Returns:
            The value as JSON gives it back, measured now or not.

        Raises:
            StoreError: the folder cannot be written.
        """
        whole = self._whole(name, key)
        path = self.folder / f"{name}-{_digest(whole)}.json"
        kept = _kept(path, whole)
        if kept is not None:
            self.reused += 1
        else:
            start = time.perf_counter()
            value = plain(dict(measure()))
            kept = {"key": whole, "seconds": round(time.perf_counter() - start, 3), "value": value}
            with disk_errors(self.folder, "creating"):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, kept)
        self.seconds += kept["seconds"]
        value = kept["value"]
        assert isinstance(value, dict)
        return value

    def place(self, name: str, key: Mapping[str, Any]) -> Path:
        """A folder for what is no JSON (a training run, resized images), of this key alone.

        Not made here: whoever writes there makes it, and goes on in it after a kill.
        """
        return self.folder / f"{name}-{_digest(self._whole(name, key))}"

    def _whole(self, name: str, key: Mapping[str, Any]) -> dict[str, Any]:
        whole: dict[str, Any] = plain({"part": name, **self._about, **key})
        return whole


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: tuples are lists, keys are text; NaN and infinity are refused."""
    return json.loads(json.dumps(value, allow_nan=False))


def _digest(key: Mapping[str, Any]) -> str:
    text = json.dumps(key, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_DIGITS // 2).hexdigest()


def _kept(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What is kept at `path` under `key`; None where nothing is, or nothing that can be read."""
    if not path.exists():
        return None
    try:
        kept = read_json(path, "a part of a figure")
    except StoreError:
        return None
    right = kept.get("key") == key and isinstance(kept.get("value"), dict)
    return kept if right and isinstance(kept.get("seconds"), int | float) else None
