"""What a build has done so far, kept for the same build to go on with after a kill.

    OUT/index.building/state.json    what is being built, and which of the files beside it count
                       NAME.NUMBER   what was kept last under a name

A file counts once state.json says so, and state.json is replaced at once: after a kill at any moment there is
what was kept last or what was kept before it, whole.
"""

import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nnflow.errors import StoreError
from nnflow.files import disk_errors, file_mark, read_json, sync_folder, whole_file, write_json

FOLDER = "index.building"
_STATE = "state.json"
_EVERY = 10.0  # seconds of work a kill may cost ...
_SHARE = 20.0  # ... or more, where keeping it would take more than a twentieth of the time


class Unfinished:
    """The half-done build of `plan` in `out`; half-done builds of other plans are removed.

    Args:
        out: the folder that is built in. The caller holds its lock.
        plan: everything that decides what is kept: two equal plans may share it.
    """

    def __init__(self, out: Path, plan: Mapping[str, Any]) -> None:
        self.folder = out / FOLDER
        self._plan = dict(plan)
        self._files: dict[str, dict[str, Any]] = {}
        self._number = 0
        with disk_errors(out, "building in"):
            try:
                state = read_json(self.folder / _STATE, "the state of an unfinished build")
                if state["plan"] != self._plan:
                    raise KeyError("plan")
                self._files, self._number = dict(state["files"]), int(state["number"])
                self._clear()
            except (StoreError, LookupError, TypeError, ValueError):
                self.remove()
                self.folder.mkdir()
                self._write()
        self._pause(0.0)

    def find(self, name: str) -> Path | None:
        """The file kept under `name`, as it was written; None when there is none."""
        entry = self._files.get(name)
        try:
            path = self.folder / entry["file"] if entry else None
            return path if path and entry and file_mark(path) == entry["mark"] else None
        except (OSError, LookupError, TypeError):
            return None

    def keep(self, name: str, write: Callable[[Path], None]) -> Path:
        """Keeps under `name` what `write` puts into the path it is given; the file kept before goes.

        Raises:
            StoreError: the disk is full or refuses; what was kept before still is.
        """
        begun = time.monotonic()
        self._number += 1
        path = self.folder / f"{name}.{self._number}"
        with disk_errors(path, "writing"):
            write(path)
            former = self._files.get(name)
            self._files[name] = {"file": path.name, "mark": file_mark(path)}
            self._write()
            if former is not None:
                (self.folder / former["file"]).unlink(missing_ok=True)
        self._pause(time.monotonic() - begun)
        return path

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps tensors under `name`, for `find_tensors`."""

        def write(path: Path) -> None:
            with whole_file(path) as partial:
                save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)

        self.keep(name, write)

    def find_tensors(self, name: str) -> dict[str, Tensor] | None:
        """The tensors kept under `name`; None when there are none."""
        path = self.find(name)
        try:
            return load_file(path) if path else None
        except (OSError, SafetensorError):
            return None

    def forget(self, *names: str) -> None:
        """Removes what is kept under `names`."""
        gone = [self._files.pop(name) for name in names if name in self._files]
        if gone:
            with disk_errors(self.folder, "writing in"):
                self._write()
                for entry in gone:
                    (self.folder / entry["file"]).unlink(missing_ok=True)

    @property
    def due(self) -> bool:
        """Whether enough has been done since something was kept last to be worth keeping."""
        return time.monotonic() >= self._due

    def remove(self) -> None:
        """Removes everything."""
        discard(self.folder.parent)

    def _clear(self) -> None:
        """Removes files that a kill left before they counted, or after they did."""
        counted = {entry["file"] for entry in self._files.values()}
        for path in self.folder.iterdir():
            if re.search(r"\.\d+(\.partial)?$", path.name) and path.name not in counted:
                path.unlink()

    def _write(self) -> None:
        state = {"plan": self._plan, "number": self._number, "files": self._files}
        write_json(self.folder / _STATE, state)
        sync_folder(self.folder.parent)

    def _pause(self, cost: float) -> None:
        self._due = time.monotonic() + max(_EVERY, _SHARE * cost)


def discard(out: Path) -> None:
    """Removes what a half-done build left in `out`."""
    folder = out / FOLDER
    if folder.exists():
        with disk_errors(folder, "removing"):
            (folder / _STATE).unlink(missing_ok=True)  # first: without it nothing else counts
            shutil.rmtree(folder)
