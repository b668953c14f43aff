"""What an experiment is, and the one way in which each of them is run, kept and drawn.

    settings, inputs -> measure (in parts) -> results -> DIR/NAME.json -> draw -> DIR/NAME.png, .pdf

Drawing reads the JSON and nothing else: a picture can be made anew without measuring.
"""

import contextlib
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from nnflow.config import checked
from nnflow.errors import InputError, NNFlowError, StoreError
from nnflow.figures.inputs import Inputs
from nnflow.figures.parts import Parts, plain
from nnflow.files import folder_lock, read_json, shown, write_json
from nnflow.planning import EXACT
from nnflow.sheet import Sheet

FORMAT = "nnflow-figure-1"

S = TypeVar("S", bound="Settings")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes, times, seeds of an experiment: a subclass has one `config.knob` for each.

    Raises:
        InputError: a value of another type or outside its range.
    """

    def __post_init__(self) -> None:
        for knob in fields(self):
            object.__setattr__(self, knob.name, checked(knob, getattr(self, knob.name)))

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any]) -> S:
        """The defaults with `values` in their place; tuples may be text such as "8,16".

        Raises:
            InputError: an unknown setting, or a value of another type or outside its range.
        """
        known = {knob.name: knob for knob in fields(cls)}
        unknown = sorted(shown(name) for name in values if name not in known)
        if unknown:
            raise InputError(f"unknown setting {', '.join(unknown)}; known are {', '.join(known)}")
        return cls(**{name: checked(known[name], value) for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """All of them, as JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


class Results(Protocol):
    """What `measure` returns: a frozen dataclass."""

    @property
    def missing(self) -> tuple[str, ...]:
        """What was asked for and could not be had, one line each; the rest is drawn all the same."""

    def to_dict(self) -> dict[str, Any]:
        """All of it, made of what JSON knows."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """DIR/NAME.json: all that a picture and its caption are made of.

    Attributes:
        name: of the experiment.
        settings: its settings.
        results: what `measure` returned.
        missing: what was asked for and could not be had.
        provenance: versions, machine, command, field, seconds of measuring, and the `inputs` with their
            fingerprints.
    """

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    missing: tuple[str, ...]
    provenance: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Document":
        """Reads what `save` wrote.

        Raises:
            StoreError: absent, or no figure of this version.
        """
        found = read_json(path, "the results of nnflow figures")
        kinds = {"name": str, "settings": dict, "results": dict, "missing": list, "provenance": dict}
        wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
        if found.get("format") != FORMAT or wrong:
            raise StoreError(
                f"{shown(path)}: not the results of a figure of this version ({FORMAT}); remove it, and "
                "repeat the command that made it"
            )
        values = {key: found[key] for key in kinds}
        return cls(**values | {"missing": tuple(found["missing"])})

    def save(self, folder: Path) -> Path:
        """Writes `folder`/NAME.json."""
        path = folder / f"{self.name}.json"
        write_json(path, {"format": FORMAT, **asdict(self), "missing": list(self.missing)})
        return path


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: of the command and of the files.
        title: of its section in the report.
        about: one line, for the help.
        claim: what the paper says, for the report.
        settings: its class of settings.
        needs: inputs that it cannot do without, of `inputs.OPTIONS`.
        takes: inputs that it makes use of where they are named.
        measure: (settings, inputs, parts) -> results.
        draw: (document, folder) -> the files written there, NAME.png first, others NAME-*.
        caption: what the picture shows, in sentences that state n, d, seeds and iterations.
        tolerant: whether it takes u* within `Inputs.tolerance`; else it is exact whatever is asked.
        trains: whether it trains networks, by default for days: only its own command makes it.
        version: raised when `measure` changes what it measures: parts of others are then not taken.
    """

    name: str
    title: str
    about: str
    claim: str
    settings: type[Settings]
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    measure: Callable[[Any, Inputs, Parts], Results]
    draw: Callable[[Document, Path], list[Path]]
    caption: Callable[[Document], str]
    version: int = 1
    tolerant: bool = True
    trains: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """All that it can be given."""
        return (*self.needs, *self.takes)

    def pictures(self, document: Document, folder: Path) -> list[Path]:
        """Draws `document` into `folder`; the files written, NAME.png first.

        Raises:
            StoreError: results that are not those of this version's `measure`.
        """
        with _readable(document):
            return self.draw(document, folder)

    def words(self, document: Document) -> str:
        """The caption of `document`.

        Raises:
            StoreError: results that are not those of this version's `measure`.
        """
        with _readable(document):
            return self.caption(document)

    def command(self, out: Path | str) -> str:
        """The shortest command that makes it."""
        names = {"index": "OUT", "run": "RUN", "held_out": "HELD", "source": "SOURCE"}
        given = [f"--{need.replace('_', '-')} {names[need]}" for need in self.needs]
        return " ".join(["nnflow figures", self.name, *given, f"--out {shown(out)}"])

    def run(self, settings: Settings, inputs: Inputs, *, command: str = "") -> Document:
        """Measures what is not measured yet, and writes `inputs.out`/NAME.json.

        Args:
            settings: of its class.
            inputs: what it is about.
            command: for the record.

        Raises:
            InputError: an input is missing or does not fit.
            BusyError: another process measures the same experiment in the same folder.
        """
        for need in self.needs:
            inputs.named(need)
        folder = inputs.out / "parts" / self.name
        with folder_lock(folder):
            parts = Parts(folder, {"experiment": self.name, "version": self.version})
            results = self.measure(settings, inputs, parts)
            document = Document(
                name=self.name,
                settings=settings.to_json(),
                results=plain(results.to_dict()),  # as a later --redraw has them
                missing=tuple(results.missing),
                provenance={
                    "nnflow": version("nnflow"),
                    "torch": torch.__version__,
                    "machine": machine(inputs.where),
                    "command": command,
                    "field": inputs.field_name if self.tolerant else EXACT,
                    "seconds": round(parts.seconds, 1),
                    "inputs": inputs.facts(),
                },
            )
            document.save(inputs.out)
        return document


@contextlib.contextmanager
def _readable(document: Document) -> Iterator[None]:
    """Turns what is missing or odd in results into one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, NNFlowError):
            raise
        raise StoreError(
            f"{document.name}.json: results of another version, or damaged ({type(error).__name__}: "
            f"{shown(error)}); repeat the command that made it, which measures nothing twice"
        ) from error


def machine(device: torch.device) -> dict[str, Any]:
    """What seconds were measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "cores": cores, "threads": torch.get_num_threads()}


def save_both(sheet: Sheet, folder: Path, name: str) -> list[Path]:
    """Writes `sheet` as NAME.png and NAME.pdf; the paths, the PNG first."""
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    for path in paths:
        sheet.save(path)
    return paths


def facts(document: Document) -> str:
    """The end of every caption: the images behind it, the field, and the command."""
    index = document.provenance["inputs"].get("index")
    images = "" if index is None else f"Images of the index: {images_in_words(index['shape'])}. "
    command = document.provenance["command"]
    made = f" Made by: {command}" if command else ""
    return f"{images}Field u*: {document.provenance['field']}.{made}"


def images_in_words(shape: Sequence[int]) -> str:
    """(n, C, H, W) as "n = 50,000, d = 3,072 (3 x 32 x 32)"; of points in the plane, no size."""
    count, *sides = shape
    size = " \N{MULTIPLICATION SIGN} ".join(map(str, sides))
    return f"n = {count:,}, d = {math.prod(sides):,}" + (f" ({size})" if math.prod(sides) > 2 else "")
