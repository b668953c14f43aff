"""manifest.json: what an index was built from and with, and the mark of its other files.

It is written last and removed first: a folder without it holds a build that has not ended.
"""

from pathlib import Path
from typing import Any

from nnflow.errors import StoreError
from nnflow.files import file_mark, read_json, shown

FORMAT = "nnflow-index-3"
MANIFEST, EMBEDDING, INDEX = "manifest.json", "embedding.safetensors", "index.faiss"
COORDINATES = "coordinates.npy"

PARTS = ("images.h5", EMBEDDING, COORDINATES, INDEX)
# Every key of the manifest and its type.
_KEYS: dict[str, type | tuple[type, ...]] = {
    "rank": (int, str),
    "kind": str,
    "reason": str,
    "probing": dict,
    "seed": int,
    "store": str,
    "count": int,
    "shape": list,
    "coordinates": int,
    "captured": float,
    "fitted_on": int,
    "collapse_time": float,
    "embedding": str,
    "files": dict,
}

_PROBED = {"lists": int, "probes": int, "recall": float}  # of an index with lists; {} of one without


def _types(values: dict[str, Any]) -> dict[str, type]:
    return {name: type(value) for name, value in values.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a build of this version, with all its keys.

    Raises:
        StoreError: no JSON object, of another version, or without what `build` writes.
    """
    path = folder / MANIFEST
    manifest = read_json(path, "an index manifest")
    if manifest.get("format") != FORMAT:
        raise StoreError(
            f"{shown(path)}: format {shown(manifest.get('format'))}, wanted {FORMAT}; build the index again "
            "with this version"
        )
    wrong = [name for name, kind in _KEYS.items() if not isinstance(manifest.get(name), kind)]
    probing = manifest.get("probing")
    if isinstance(probing, dict) and probing and _types(probing) != _PROBED:
        wrong.append("probing")
    files = manifest.get("files")
    if isinstance(files, dict):
        wrong += [name for name in PARTS if not isinstance(files.get(name), dict)]
    if wrong:
        raise StoreError(f"{shown(path)}: {', '.join(wrong)} missing or wrong; build the index again")
    return manifest


def check_part(path: Path, mark: dict[str, Any]) -> None:
    """Compares the file at `path` with the mark that the manifest keeps of it.

    Raises:
        StoreError: missing, cut, or another file.
    """
    if not path.exists():
        raise StoreError(f"{shown(path)}: missing; build the index again")
    try:
        found = file_mark(path)
    except OSError as error:
        raise StoreError(
            f"{shown(path)}: not readable ({shown(error.strerror)}); build the index again"
        ) from error
    if found["bytes"] != mark.get("bytes"):
        raise StoreError(
            f"{shown(path)}: {found['bytes']} bytes, wanted {shown(mark.get('bytes'))}: truncated or of "
            "another build; build the index again"
        )
    if found != mark:
        raise StoreError(f"{shown(path)}: not the file this index was built with; build the index again")


def is_built(folder: Path, settings: dict[str, Any]) -> bool:
    """Whether a build with these settings has ended in `folder`, and its parts are as it left them."""
    try:
        manifest = read_manifest(folder)
        for name in PARTS:
            check_part(folder / name, manifest["files"][name])
    except StoreError:
        return False
    return all(manifest.get(key) == value for key, value in settings.items())
