"""One direction of imports, and one module for each heavy dependency: read from the source, not run."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest

import nnflow

ROOT = Path(nnflow.__file__).parent

# A module imports only from those above it.
ORDER = """
errors memory precision files texts filemap path weighted codec pixels
sources.base sources.folder sources.archive sources.shards sources.tables sources.parquet sources.arrays
sources.subset sources decode hdf5file unsealed recipes ingest store latents
integers laidout projection
embedding unfinished covariance fitting coordinates faiss_backend probing manifest building index
support nearfield scan residual ladder products farfield planning calibration planned velocity
measuring calibrating settling
tally pairs targets config unet checkpoint diary batches trainer training
sampling metrics
imageset features classifier classifying frechet mmd manifold quality
evaluation noise paired sheet plots curves
figures figures.parts figures.inputs figures.experiment figures.pictures figures.points figures.alignment
figures.sizes figures.spectra figures.drawn figures.drawn.cosines figures.drawn.dimension
figures.walk figures.drawn.trajectories figures.drawn.plane
figures.plane figures.cosines figures.dimension figures.trajectories
figures.networks figures.drawn.tiles figures.compared figures.drawn.capacity figures.drawn.tau
figures.drawn.targets figures.capacity figures.tau figures.targets figures.registry report
cli.options cli.calibrate cli.index cli.train cli.sample cli.classifier cli.evaluate cli.figures cli
""".split()  # noqa: SIM905
SPECIAL = {"", "__main__"}  # the public names; the door to the command line

ONLY = {
    "h5py": {"hdf5file"},
    "faiss": {"faiss_backend"},
    "matplotlib": {"sheet"},
    "diffusers": {"unet"},
    "accelerate": {"training"},
    "torchdiffeq": {"sampling"},
    "safetensors": {"embedding", "unfinished", "unet", "checkpoint", "classifying"},
    "pyarrow": {"sources.parquet"},
    "click": {name for name in ORDER if name.startswith("cli")},
}
NEVER = {"torchvision", "pickle", "scipy", "sklearn", "beartype", "pytest"}
# A new user without the `train` extra, or who only wants arrays, imports nnflow without them.
LAZY = {"diffusers", "accelerate", "tensorboard", "matplotlib", "pyarrow"}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str) -> list[tuple[str, bool]]:
    """Full names imported anywhere in `source`, by statement or importlib, and whether at import time."""
    tree, found = ast.parse(source), []
    inside = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}: write it in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "train_extra", "_pyarrow"}:
                names = [str(node.args[0].value)]
        found += [(name, id(node) not in inside) for name in names]
    return found


def within(name: str) -> str:
    """The module of nnflow that a full name means: nnflow.store.ImageStore is store, as nnflow.store is."""
    rest = name.removeprefix("nnflow").removeprefix(".")
    while rest not in SOURCES:
        rest = rest.rpartition(".")[0]
    return rest


def test_what_the_reader_of_imports_sees() -> None:
    source = """
import a.b as c, d
if True:
    from e import f as g
def later():
    import h
    importlib.import_module("i")
"""
    assert sorted(imports(source)) == [("a.b", True), ("d", True), ("e.f", True), ("h", False), ("i", False)]
    assert within("nnflow.store.ImageStore") == within("nnflow.store") == "store"
    assert within("nnflow.cli.options.FOLDER") == "cli.options"
    assert within("nnflow.NNFlowError") == ""


def test_the_order_names_every_module_once() -> None:
    assert sorted(ORDER) == sorted(SOURCES.keys() - SPECIAL)


def test_modules_import_only_from_those_above() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    upward, seen = [], 0
    for name in ORDER:
        for target, _ in imports(SOURCES[name].read_text(encoding="utf-8")):
            if target.split(".")[0] != "nnflow":
                continue
            seen += 1
            module = within(target)
            if module in SPECIAL or place[module] >= place[name]:
                upward.append(f"{name} imports {module or 'nnflow'}")
    assert not upward
    assert seen > 100, "the imports were not found: the test would prove nothing"


def users() -> dict[str, list[tuple[str, bool]]]:
    """Which modules import each foreign package, and whether at import time."""
    found = defaultdict(list)
    for name, path in SOURCES.items():
        for target, eager in imports(path.read_text(encoding="utf-8")):
            found[target.split(".")[0]].append((name, eager))
    return found


@pytest.mark.parametrize("package", ONLY)
def test_a_heavy_dependency_has_its_module(package: str) -> None:
    found = {name for name, _ in users()[package]}
    assert found, f"nobody imports {package}: the list is out of date"
    assert found <= ONLY[package]


@pytest.mark.parametrize("package", sorted(LAZY))
def test_an_optional_dependency_is_imported_when_needed(package: str) -> None:
    assert [name for name, eager in users()[package] if eager] == []


def test_what_nnflow_never_imports() -> None:
    assert NEVER.isdisjoint(users())
    assert "torch" in users()
