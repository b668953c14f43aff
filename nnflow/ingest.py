"""A source of images, or of latents, into images.h5: decoded by several threads, resumed after a kill.

While it is being built, OUT holds
    images.h5.plan.json   what is built, from which source; written once the next two exist
    images.h5.partial     the whole file, but for rows still missing and the fingerprint
    images.h5.journal     one byte per listed image: 1 once its row is safely in the partial file
and images.h5 appears by a rename when all is synced. Rows have their place from the start, so the
bytes depend neither on the number of workers nor on how often the build was killed.
"""

import csv
import dataclasses
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from nnflow import hdf5file
from nnflow.decode import Decoder
from nnflow.errors import InputError, SourceError, StoreError
from nnflow.files import disk_errors, read_json, shown, sync_folder, whole_file, write_at, write_json
from nnflow.hdf5file import Header, Recipe
from nnflow.recipes import SKIPPED, recipe_of, refuse_other, refuse_unless_of
from nnflow.sources import Item, Latents, Source, UnreadableImageError, open_source
from nnflow.texts import Texts
from nnflow.unsealed import COPY_BYTES, Rows, runs, seal

IMAGES = "images.h5"
_CHUNK_BYTES = 1 << 21  # of decoded rows per task ...
_CHUNK_ITEMS = 16  # ... and images to decode: a photograph takes up to 0.1 s, and a kill costs whole tasks
_LARGEST = 1e6  # of a latent's values: squares of rows stay within float32
_QUEUED = 4  # tasks per worker in flight


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What one task did: rows now in the partial file, and images that could not be read."""

    done: list[int]
    unreadable: dict[int, UnreadableImageError]


def build_images(
    source: Path | str,
    out: Path | str,
    *,
    size: int | None = None,
    grey: bool = False,
    background: str = "white",
    scaling: float | None = None,
    workers: int | None = None,
    skip_unreadable: bool = False,
    progress: bool = False,
    limit: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Builds `out`/images.h5 from the images in `source`, or goes on where a killed build stopped.

    Takes no lock: the caller holds `files.folder_lock(out)`. A finished images.h5 of the same
    source and parameters is returned as it is, without decoding.

    Args:
        source: images in any of the forms that `sources` lists.
        out: the folder; made if missing.
        size: height and width of the stored images, in pixels. Latents keep theirs.
        grey: store one channel instead of three.
        background: colour under transparent pixels, a CSS name or #rrggbb.
        scaling: what latents are multiplied by, such as an autoencoder's own scaling_factor; None for what
            gives those stored unit root mean square.
        workers: decoding threads; one per core by default.
        skip_unreadable: leave out images that cannot be read and list them in skipped.csv.
        progress: show a bar on stderr.
        limit: store no more images than this, drawn at random by `seed`; all by default.
        classes: store only images of the classes called so; all by default.
        seed: of that draw. Draws of one seed are nested: a larger `limit` has the images of a smaller.

    Raises:
        SourceError: no such source, no images, or (without `skip_unreadable`) one unreadable image.
        StoreError: `out` holds other data, or the disk refuses; what is built so far is kept.
        InputError: a parameter outside its range.
    """
    decoder = None if size is None else Decoder(size=size, grey=grey, background=background)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise InputError(f"{workers} workers: wanted at least one")
    out = Path(out)
    with open_source(source, limit=limit, classes=classes, seed=seed) as images:
        recipe = recipe_of(images, decoder, grey=grey, scaling=scaling)
        whole = out / IMAGES
        if os.path.lexists(whole):
            refuse_unless_of(whole, recipe, skip_unreadable=skip_unreadable)
        else:
            with disk_errors(out, "building in"):
                out.mkdir(parents=True, exist_ok=True)
                _Build(
                    source=images,
                    out=out,
                    recipe=recipe,
                    decoder=decoder,
                    workers=workers,
                    skip_unreadable=skip_unreadable,
                    progress=progress,
                ).run()
        _remove_leftovers(out)
    return whole


def is_unfinished(out: Path) -> bool:
    """Whether a build has begun in `out` and no images.h5 came of it yet."""
    return (out / f"{IMAGES}.plan.json").exists() and not (out / IMAGES).exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Build:
    """One build in one folder, from its plan to the rename."""

    source: Source
    out: Path
    recipe: Recipe
    decoder: Decoder | None  # None for latents
    workers: int
    skip_unreadable: bool
    progress: bool

    @property
    def form(self) -> Latents:
        """Shape and type of a stored row."""
        if self.source.latents is not None:
            return self.source.latents
        assert self.decoder is not None
        return Latents(self.decoder.shape, np.dtype(np.uint8))

    @property
    def partial(self) -> Path:
        return self.out / f"{IMAGES}.partial"

    @property
    def journal(self) -> Path:
        return self.out / f"{IMAGES}.journal"

    @property
    def plan(self) -> Path:
        return self.out / f"{IMAGES}.plan.json"

    @property
    def compact(self) -> Path:
        return self.out / f"{IMAGES}.compact"

    def run(self) -> None:
        """Everything up to a whole images.h5."""
        header = self._unfinished() or self._started()
        with Rows(self.partial, self.journal, header) as rows:
            unreadable = _decode_all(self, rows)
            finished = self._without(unreadable, rows) if unreadable else self.partial
        if not unreadable:
            (self.out / SKIPPED).unlink(missing_ok=True)
        seal(finished)
        finished.replace(self.out / IMAGES)
        sync_folder(self.out)

    def _unfinished(self) -> Header | None:
        """What a killed build left to go on with, if anything."""
        if not self.plan.exists():
            return None
        try:
            there = Recipe(**read_json(self.plan, "the plan of an unfinished build"))
        except TypeError as error:
            raise StoreError(f"{shown(self.plan)}: not a plan of this nnflow; remove it") from error
        refuse_other(self.out, there, self.recipe)
        try:
            header = hdf5file.read_header(self.partial)
            whole = self.journal.stat().st_size == self.recipe.listed == header.shape[0]
        except (StoreError, OSError):
            return None
        return header if whole and header.recipe == self.recipe else None

    def _started(self) -> Header:
        """A new file of missing rows. The plan comes last: without it nothing has been decoded."""
        _remove_leftovers(self.out)
        try:
            self._allocate(self.partial, self.source.items)
            with self.journal.open("wb") as file:
                file.write(bytes(self.recipe.listed))
                file.flush()
                os.fsync(file.fileno())
            write_json(self.plan, dataclasses.asdict(self.recipe))
        except BaseException:
            _remove_leftovers(self.out)  # a full disk gets its room back
            raise
        return hdf5file.read_header(self.partial)

    def _allocate(self, path: Path, items: Sequence[Item]) -> None:
        """An images.h5 for `items` without its pixels, its room on the disk reserved."""
        listed = [(item.group, item.path) for item in items]  # one pass: items may be made on the way
        classes = sorted({group for group, _ in listed if group is not None})
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [-1 if group is None else numbers[group] for group, _ in listed]
        hdf5file.create(
            path,
            (len(items), *self.form.shape),
            self.recipe,
            dtype=self.form.dtype,
            labels=np.asarray(labels, np.int64),
            classes=classes,
            paths=Texts.of([path for _, path in listed]),
        )

    def _without(self, unreadable: dict[int, UnreadableImageError], rows: Rows) -> Path:
        """A file of the readable images only, and skipped.csv."""
        kept = [row for row in range(self.recipe.listed) if row not in unreadable]
        self.compact.unlink(missing_ok=True)
        self._allocate(self.compact, [self.source.items[row] for row in kept])
        header = hdf5file.read_header(self.compact)
        with self.compact.open("r+b") as file:
            at = header.pixels_at
            at_most = max(1, COPY_BYTES // header.row_bytes)
            for first, count in runs(kept, at_most):
                at += write_at(file.fileno(), rows.get(first, count), at)
        with whole_file(self.out / SKIPPED) as partial:
            _write_skipped(partial, [unreadable[row] for row in sorted(unreadable)])
        return self.compact


def _decode_all(build: _Build, rows: Rows) -> dict[int, UnreadableImageError]:
    """Decodes the rows not done yet; the images that could not be read, by row.

    Raises:
        SourceError: the first unreadable image, or with `skip_unreadable` when none was readable.
    """
    todo = build.source.reading_order(np.flatnonzero(~rows.done))
    held = build.source.latents is not None or build.source.holds(build.form.shape)
    step = max(1, _CHUNK_BYTES // rows.header.row_bytes)
    step, work = (step, _copy_some) if held else (min(step, _CHUNK_ITEMS), _decode_some)
    unreadable: dict[int, UnreadableImageError] = {}
    total = len(rows.done)
    bar = tqdm(
        total=total,
        initial=total - len(todo),
        desc="ingest",
        unit="image",
        disable=not build.progress,
    )
    with bar, ThreadPoolExecutor(build.workers, thread_name_prefix="ingest") as pool:
        pending: deque[Future[_Outcome]] = deque()
        try:
            for first in range(0, len(todo), step):
                pending.append(pool.submit(work, build, rows, todo[first : first + step]))
                if len(pending) >= _QUEUED * build.workers:
                    bar.update(_collect(build, rows, pending.popleft(), unreadable))
            while pending:
                bar.update(_collect(build, rows, pending.popleft(), unreadable))
        finally:
            # Also after an error or Ctrl-C: what the threads have finished is kept.
            for future in pending:
                if not future.cancel() and future.exception() is None:
                    rows.note(future.result().done)
            rows.sync()
    if len(unreadable) == total:
        error = unreadable[0]
        raise SourceError(f"none of the {total} images could be read; the first: {error}")
    return unreadable


def _decode_some(build: _Build, rows: Rows, positions: Int[np.ndarray, " n"]) -> _Outcome:
    assert build.decoder is not None
    block = np.empty((len(positions), *rows.header.shape[1:]), np.uint8)
    done: list[int] = []
    unreadable = {}
    for position in positions.tolist():
        item = build.source.items[position]
        try:
            block[len(done)] = build.decoder.decode(build.source.read(item), item.path)
            done.append(position)
        except UnreadableImageError as error:
            # Not `error` itself: its traceback would keep the block of every such task alive.
            unreadable[position] = UnreadableImageError(error.path, error.cause)
    by_row = np.argsort(done)
    rows.put([done[i] for i in by_row], block[by_row])
    return _Outcome(done, unreadable)


def _copy_some(build: _Build, rows: Rows, positions: Int[np.ndarray, " n"]) -> _Outcome:
    """Pixels or latents that need no decoding."""
    positions = np.sort(positions)
    block = build.source.block(positions)
    unreadable: dict[int, UnreadableImageError] = {}
    if build.source.latents is not None:
        fine = np.abs(block).max((1, 2, 3)).astype(np.float32) <= _LARGEST  # False for NaN, too
        for position in positions[~fine].tolist():
            cause = f"a row of {build.source.path.name} with NaN, infinity or a value beyond {_LARGEST:g}"
            unreadable[position] = UnreadableImageError(build.source.items[position].path, cause)
        if unreadable:
            positions, block = positions[fine], block[fine]
    done: list[int] = positions.tolist()
    rows.put(done, block)
    return _Outcome(done, unreadable)


def _collect(
    build: _Build,
    rows: Rows,
    task: Future[_Outcome],
    unreadable: dict[int, UnreadableImageError],
) -> int:
    """Notes what `task` did; the number of images it looked at."""
    outcome = task.result()
    rows.note(outcome.done)
    unreadable |= outcome.unreadable
    if outcome.unreadable and not build.skip_unreadable:
        # Tasks are collected in the order of reading, and each has its images in that order, so this
        # is the same image whatever the number of workers.
        first = next(iter(outcome.unreadable.values()))
        raise UnreadableImageError(
            first.path,
            f"{first.cause}; pass --skip-unreadable to leave it out (what is read is kept)",
        )
    return len(outcome.done) + len(outcome.unreadable)


def _write_skipped(path: Path, unreadable: Sequence[UnreadableImageError]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "reason"])
        table.writerows([_cell(error.path), _cell(error.cause)] for error in unreadable)


def _cell(text: str) -> str:
    """`text` as a spreadsheet shows it instead of computing it."""
    text = shown(text)
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def _remove_leftovers(out: Path) -> None:
    """Removes what exists only while building."""
    for name in ("partial", "journal", "plan.json", "plan.json.partial", "compact"):
        (out / f"{IMAGES}.{name}").unlink(missing_ok=True)
    (out / f"{SKIPPED}.partial").unlink(missing_ok=True)
