"""Stores of latents: what comes out is what went in, whatever stops the build; decoders; the command line."""

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from contract import all_images
from refusals import refused
from stores import latents_of, store_of
from torch import Tensor, nn

import nnflow
from nnflow import unfinished, unsealed
from nnflow.calibrating import calibrate
from nnflow.calibration import Calibration
from nnflow.classifying import train_classifier
from nnflow.cli import main
from nnflow.config import resolve
from nnflow.errors import InputError, SourceError, StoreError
from nnflow.features import Pixels
from nnflow.figures.inputs import Inputs
from nnflow.hdf5file import read_header
from nnflow.index import NeighbourIndex
from nnflow.ingest import build_images
from nnflow.latents import open_decoder, pictures_of
from nnflow.quality import image_quality
from nnflow.sources import arrays, open_source
from nnflow.store import ImageStore
from nnflow.training import train
from nnflow.unet import build
from nnflow.unfinished import Unfinished

N, SHAPE = 83, (5, 3, 7)
LABELS = np.random.default_rng(1).integers(1, 12, N)


def raw(dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((N, *SHAPE)).astype(dtype)


def saved(path: Path, *, packed: bool = False, **named: np.ndarray) -> Path:
    (np.savez_compressed if packed else np.savez)(path, **named)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("packed", [False, True])
def test_latents_are_kept_bit_for_bit(tmp_path: Path, dtype: type, packed: bool) -> None:
    z = raw(dtype)
    z[3, 2, 1, 4] = -0.0
    z[4, 0, 0, 0] = np.finfo(dtype).smallest_subnormal
    store = ImageStore.build(saved(tmp_path / "x.npz", packed=packed, latents=z, y=LABELS), tmp_path / "out")
    order = np.argsort(LABELS, kind="stable")
    assert store.shape == (N, *SHAPE)
    assert store.pixels.numpy().tobytes() == z[order].tobytes()
    assert store.pixels.data_ptr() % 64 == 0
    assert [int(name) for name in store.classes] == sorted(set(LABELS.tolist()))
    with h5py.File(store.folder / "images.h5") as file:  # for other tools, too
        np.testing.assert_array_equal(file["images"][...], z[order])
        assert file["images"].dtype == dtype
    ids = torch.tensor([N - 1, 0, 7, 7])
    wanted = z[order][ids].astype(np.float64) * store.codec.scaling
    np.testing.assert_allclose(store.images(ids).numpy(), wanted, rtol=2e-7, atol=1e-44)


def test_numbers_lie_at_multiples_of_their_size(tmp_path: Path) -> None:
    """Behind tables of an odd length, which 83 paths are not."""
    np.save(tmp_path / "x.npy", np.ones((700, 1, 3, 1), np.float32))
    assert read_header(build_images(tmp_path / "x.npy", tmp_path / "out")).pixels_at % 64 == 0


def test_an_npy_and_parts_are_the_same_store(tmp_path: Path) -> None:
    z = raw()
    np.save(tmp_path / "x.npy", z)
    (tmp_path / "parts").mkdir()
    saved(tmp_path / "parts/1.npz", arr_0=z[:50])
    saved(tmp_path / "parts/2.npz", arr_0=z[50:])
    one = ImageStore.build(tmp_path / "x.npy", tmp_path / "a", workers=1)
    other = ImageStore.build(tmp_path / "parts", tmp_path / "b", workers=3)
    assert one.fingerprint == other.fingerprint
    few = ImageStore.build(tmp_path / "x.npy", tmp_path / "c", limit=20)
    rows = [int(path) for path in few.paths]
    assert few.pixels.numpy().tobytes() == z[rows].tobytes()
    wanted = np.square(z[rows], dtype=np.float64).mean() ** -0.5
    assert few.codec.scaling == pytest.approx(wanted, rel=1e-5)  # of the images kept


def test_fingerprints_tell_type_and_scaling_apart(tmp_path: Path) -> None:
    z = raw()
    found = []
    for name, array, scaling in [
        ("a", z, None), ("b", z, 1.0), ("c", z, 0.5), ("d", z.astype(np.float32), 1.0), ("e", -z, None),
    ]:  # fmt: skip
        np.save(tmp_path / f"{name}.npy", array)
        found.append(ImageStore.build(tmp_path / f"{name}.npy", tmp_path / name, scaling=scaling).fingerprint)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("stop", [1, 3, "seal"])
def test_a_stopped_build_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int | str
) -> None:
    np.save(tmp_path / "x.npy", raw())
    whole = build_images(tmp_path / "x.npy", tmp_path / "a").read_bytes()
    monkeypatch.setattr("nnflow.ingest._CHUNK_BYTES", 20 * 210)
    calls = 0

    def dying(call: Callable[..., object]) -> Callable[..., object]:
        def called(*rest: object) -> object:
            nonlocal calls
            calls += 1
            if stop in (calls, "seal"):
                raise KeyboardInterrupt
            return call(*rest)

        return called

    with monkeypatch.context() as patch:
        if stop == "seal":
            patch.setattr(unsealed, "_scaling", dying(unsealed._scaling))
        else:
            patch.setattr(arrays.ArraySource, "block", dying(arrays.ArraySource.block))
        with pytest.raises(KeyboardInterrupt):
            build_images(tmp_path / "x.npy", tmp_path / "b", workers=1)
    with refused(StoreError, "its build has not finished"):
        ImageStore.open(tmp_path / "b")
    assert build_images(tmp_path / "x.npy", tmp_path / "b", workers=2).read_bytes() == whole


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 3e6])
def test_rows_that_are_no_numbers_are_named(tmp_path: Path, wrong: float) -> None:
    z = raw(np.float32)
    z[[17, 60], 2, 1, 3] = wrong
    np.save(tmp_path / "x.npy", z)
    with refused(SourceError, r"^17: a row of x\.npy with NaN, infinity or a value beyond 1e\+06.*--skip"):
        ImageStore.build(tmp_path / "x.npy", tmp_path / "out")
    store = ImageStore.build(tmp_path / "x.npy", tmp_path / "out", skip_unreadable=True)
    kept = np.delete(np.arange(N), [17, 60])
    assert store.pixels.numpy().tobytes() == z[kept].tobytes()
    assert '\n60,"a row of x.npy with NaN' in (tmp_path / "out/skipped.csv").read_text()


@pytest.mark.parametrize(
    ("z", "words"),
    [
        (raw().astype(np.float64), "float64 values; wanted images as uint8, 0 to 255, or latents as float16"),
        (raw().astype(">f4"), ">f4 values; wanted"),
        (raw().reshape(N, -1), r"float16 values of shape \(105,\); wanted latents of \(C, H, W\)"),
        (np.zeros((4, 8, 8, 3), np.float32), r"\(8, 8, 3\); wanted .*channels first, or images as uint8"),
        (np.zeros((4, 0, 3, 3), np.float32), "wanted latents"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, z: np.ndarray, words: str) -> None:
    np.save(tmp_path / "x.npy", z)
    with refused(SourceError, rf"x\.npy: .*{words}"):
        open_source(tmp_path / "x.npy")


def test_what_suits_only_pixels_or_only_latents(tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", raw())
    np.save(tmp_path / "p.npy", np.zeros((9, 3, 4, 4), np.uint8))
    np.save(tmp_path / "0.npy", np.zeros((9, 3, 4, 4), np.float32))
    (tmp_path / "mixed").mkdir()
    saved(tmp_path / "mixed/1.npz", z=raw())
    saved(tmp_path / "mixed/2.npz", z=raw(np.float32))
    for source, options, kind, words in [
        ("z.npy", {"size": 7}, InputError, "are stored as they are: leave out size"),
        ("z.npy", {"grey": True}, InputError, "leave out size and grey"),
        ("z.npy", {"scaling": 0.0}, InputError, "scaling 0: wanted 1e-06 to 1e"),
        ("z.npy", {"scaling": float("nan")}, InputError, "scaling nan"),
        ("p.npy", {}, InputError, "no size"),
        ("p.npy", {"size": 4, "scaling": 2.0}, InputError, "for latents .* these are pixels"),
        ("0.npy", {}, StoreError, "root mean square of 0: .*give one, --scaling 1"),
        ("mixed", {}, SourceError, r"2\.npz.* is of float32, .*1\.npz.* of float16; wanted one type"),
    ]:
        with refused(kind, words):
            ImageStore.build(tmp_path / source, tmp_path / f"out-{source}", **options)  # type: ignore[arg-type]
    assert len(ImageStore.build(tmp_path / "z.npy", tmp_path / "out")) == N
    with refused(StoreError, "built with another scaling rms, asked for 0.5"):
        ImageStore.build(tmp_path / "z.npy", tmp_path / "out", scaling=0.5)


def test_what_reads_pixels_refuses_latents(tmp_path: Path) -> None:
    names = [f"{number % 2}" for number in range(8)]
    latents = latents_of(torch.from_numpy(raw()[:8]), tmp_path / "z", classes=names)
    with refused(InputError, r"a classifier: of pixels only, .*out holds latents; index the images"):
        train_classifier(latents, tmp_path / "classifier")
    with refused(InputError, "features: of pixels only"):
        image_quality(Pixels(latents.shape[1:]), latents, samples=latents.images(torch.arange(4)))
    pixels = store_of(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), tmp_path / "p")
    inputs = Inputs(out=tmp_path, index=latents.folder, held_out=latents.folder)
    with refused(InputError, "figures: of pixels only"):
        inputs.store  # noqa: B018
    with refused(InputError, "figures: of pixels only"):
        Inputs(out=tmp_path, index=pixels.folder, held_out=latents.folder).held_out_store  # noqa: B018


def test_damage_never_raises_anything_else(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", raw())
    path = build_images(tmp_path / "x.npy", tmp_path / "out")
    whole = path.read_bytes()
    for start, mark in [(928, b"1e-9 3"), (928, b"nan 1"), (928, b"1 inf"), (928, b"1"), (930, b"\xff")]:
        path.write_bytes(whole[:start] + mark.ljust(960 - start, b"\0") + whole[960:])
        with refused(StoreError, "truncated or damaged"):
            ImageStore.open(path)
    path.write_bytes(whole[:928] + bytes(96) + whole[1024:])
    with refused(StoreError, "not finished"):
        ImageStore.open(path)
    path.write_bytes(whole.replace(b'"float16"', b'"float32"'))
    with refused(StoreError, "do not fit|damaged"):
        ImageStore.open(path)
    random = np.random.default_rng(0)
    for _ in range(200):
        broken = np.frombuffer(whole, np.uint8).copy()
        broken[random.integers(0, 1000, 4)] = random.integers(0, 256, 4)
        path.write_bytes(broken.tobytes())
        with contextlib.suppress(StoreError):  # perhaps; but nothing else is raised
            ImageStore.open(path)
    path.write_bytes(whole)
    assert read_header(path).codec == ImageStore.open(path).codec


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_embedding_is_that_of_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    """Latents far from 0: sums of squares about 0 would cancel."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0.5, -1.5, 105).view(SHAPE)
    z = (40 + spread * torch.randn(300, *SHAPE, generator=generator)).to(dtype)
    store = latents_of(z, tmp_path, scaling=0.1)
    embedding = NeighbourIndex.build(store, store.folder, rank=6, memory=500_000).embedding
    images = z.flatten(1).double() * 0.1
    centred = images - images.mean(0)
    _, values, axes = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(embedding.mean.double(), images.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding.spectrum.double(), values.square() / 300, rtol=2e-4, atol=1e-9)
    along = (embedding.principal[:6].double() * axes[:6]).sum(1).abs()
    assert along.min() > 1 - 1e-5
    reach = centred.norm(dim=1).max().item()
    assert reach <= embedding.radius <= reach * (1 + 1e-3)
    outside = (centred - (centred @ axes[:6].T) @ axes[:6]).norm(dim=1).max().item()
    assert outside <= embedding.residual_radius <= outside + 1e-3


def test_an_index_stopped_after_any_step_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(400, 4, 3, 5, generator=torch.Generator().manual_seed(1)).half()
    images = latents_of(z, tmp_path / "images").folder / "images.h5"
    monkeypatch.setattr(unfinished, "_EVERY", 0.0)
    monkeypatch.setattr(unfinished, "_SHARE", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    real, keeps, stop = Unfinished.keep, 0, 0

    def kept(self: Unfinished, name: str, write: Callable[[Path], None]) -> Path:
        nonlocal keeps
        path, keeps = real(self, name, write), keeps + 1
        if keeps == stop:
            raise KeyboardInterrupt
        return path

    def built(folder: Path) -> dict[str, bytes]:
        folder.mkdir(exist_ok=True)
        if not (folder / "images.h5").exists():
            os.link(images, folder / "images.h5")
        NeighbourIndex.build(ImageStore.open(folder), folder, rank=8, kind="IVF4,Flat", memory=130_000)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    monkeypatch.setattr(Unfinished, "keep", kept)
    wanted, ended = built(tmp_path / "whole"), False
    while not ended:
        stop, keeps = stop + 1, 0
        try:
            ended = built(tmp_path / f"{stop}") == wanted
            assert ended
        except KeyboardInterrupt:
            assert built(tmp_path / f"{stop}") == wanted, stop
    assert stop > 9


def test_a_calibration_without_held_out_latents_and_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nnflow.calibrating._times", lambda collapse: (0.1, 0.3))
    one = latents_of(torch.from_numpy(raw(np.float32)), tmp_path / "a", scaling=1.0)
    other = latents_of(torch.from_numpy(raw(np.float32, 5)), tmp_path / "b", scaling=1.0)
    third = latents_of(torch.from_numpy(raw(np.float32, 5)), tmp_path / "c", scaling=1.1)
    index = NeighbourIndex.build(one, one.folder, rank=8)
    found = calibrate(index, queries=4)
    assert found.about["held_out"] == "none"
    assert all(entry.held_out is None for entry in found.entries)
    assert Calibration.open(index).entries == found.entries
    with_others = calibrate(index, queries=4, held_out=other)
    assert with_others.about["held_out"] == other.fingerprint
    assert all(entry.held_out is not None for entry in with_others.entries)
    with refused(InputError, r"held-out images are latents times 1\.1, the images indexed latents times 1:"):
        calibrate(index, queries=4, held_out=third)


class Turned(nn.Module):
    """The decoder of an orthogonal 'autoencoder': (C, H, W) latents to grey pictures."""

    def __init__(self, turn: Tensor, side: int) -> None:
        super().__init__()
        self.register_buffer("turn", turn)
        self.side = side

    turn: Tensor

    def forward(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.turn).reshape(-1, 1, self.side, self.side)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageStore, ImageStore, Turned, Path]:
    """Grey 6 x 6 pictures, their latents (4, 3, 3) by a rotation, and the decoder in files of both kinds."""
    folder = tmp_path_factory.mktemp("turned")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 1, 6, 6), generator=generator).to(torch.uint8)
    plain = store_of(pixels, folder / "pixels")
    turn = torch.linalg.qr(torch.randn(36, 36, generator=generator).double())[0].float()
    z = 7 * (plain.images(torch.arange(40)).flatten(1) @ turn.T).view(40, 4, 3, 3)
    decoder = Turned(turn / 7, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it writes
        torch.jit.trace(decoder, z[:2]).save(folder / "decoder.pt")
        shapes = {"z": {0: torch.export.Dim("batch")}}
        torch.export.save(torch.export.export(decoder, (z[:2],), dynamic_shapes=shapes), folder / "d.pt2")
    return plain, latents_of(z, folder / "latents"), decoder, folder


def test_samples_of_latents_decode_to_the_pictures(
    turned: tuple[ImageStore, ImageStore, Turned, Path],
) -> None:
    """A rotation keeps distances, so the field of latents is the rotated field of pictures, but for scale."""
    plain, store, decoder, folder = turned
    found = nnflow.sample(nnflow.EmpiricalVelocity.exact(store, device="cpu"), range(9), steps=20)
    pictures = all_images(plain)
    for decode in (decoder, open_decoder(folder / "decoder.pt"), open_decoder(folder / "d.pt2")):
        seen = pictures_of(found, store, decode, batch=4).flatten(1).double()
        near = torch.cdist(seen, pictures).min(1)
        assert near.values.max() < 1e-4
        nearest = nnflow.nearest_images(store, found, 1).ids[:, 0]
        assert torch.equal(near.indices, nearest)
    few = plain.images(torch.arange(3))
    assert torch.equal(pictures_of(few, plain), few)


def test_decoders_that_are_none(turned: tuple[ImageStore, ImageStore, Turned, Path], tmp_path: Path) -> None:
    plain, store, decoder, _ = turned
    x = store.images(torch.arange(5))
    for decode, words in [
        (None, "holds latents: wanted decode="),
        (lambda z: (decoder(z),), "returned a tuple: .*vae.decode"),
        (lambda z: z, r"of shape \(5, 4, 3, 3\): wanted float pictures \(5, 1 or 3"),
        (lambda z: decoder(z)[:1], r"\(1, 1, 6, 6\)"),
        (lambda z: decoder(z).byte(), "torch.uint8"),
        (lambda z: decoder(z) / 0, "NaN or infinity"),
    ]:
        with refused(InputError, words):
            pictures_of(x, store, decode)
    with refused(InputError, "holds pixels, which need no decoder"):
        pictures_of(plain.images(torch.arange(2)), plain, decoder)
    (tmp_path / "x.pt").write_bytes(b"nothing" * 99)
    (tmp_path / "x.pt2").write_bytes(b"nothing" * 99)
    torch.save({"weights": 1}, tmp_path / "y.pt")
    for name, words in [
        ("x.pt", "not a decoder"),
        ("x.pt2", "not a"),
        ("y.pt", "not a"),
        ("z.pt", "no such"),
    ]:
        with refused(InputError, words):
            open_decoder(tmp_path / name)


def called(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    return int(end.value.code or 0), out.out, out.err


def test_the_command_line(
    turned: tuple[ImageStore, ImageStore, Turned, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, _, folder = turned
    source, out = folder / "latents/source.npz", tmp_path / "out"
    code, said, _ = called(capsys, "index", source, out, "--calibration-seconds", 0, "--scaling", 0.125)
    assert code == 0
    assert "40 of 3 x 3, 4 channels of latents in float32, times 0.125" in said
    assert json.loads(called(capsys, "info", out, "--json")[1])["scaling"] == 0.125
    sampling = ("sample", "--index", out, "--seeds", "0-3", "--estimator", "exact", "--out")
    code, said, noted = called(capsys, *sampling, tmp_path / "plain")
    assert code == 0
    assert "no pictures are drawn without their decoder" in noted
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == [
        "config.json", "nearest.json", "samples-empirical.npy",
    ]  # fmt: skip
    assert json.loads((tmp_path / "plain/config.json").read_text())["scaling"] == 0.125
    code, said, _ = called(capsys, *sampling, tmp_path / "drawn", "--decode", folder / "decoder.pt")
    assert code == 0
    assert (tmp_path / "drawn/grid-empirical.png").exists()
    one, other = (np.load(tmp_path / name / "samples-empirical.npy") for name in ("plain", "drawn"))
    np.testing.assert_array_equal(one, other)
    code, _, noted = called(capsys, *sampling, tmp_path / "no", "--flip")
    assert (code, "a mirrored latent is not" in noted) == (2, True)
    code, said, _ = called(
        capsys, "evaluate", "--index", out, "--samples", tmp_path / "plain", "--out", tmp_path / "e"
    )
    assert code == 0
    assert "samples: 4 of 4 memorised" in said
    code, _, noted = called(capsys, "train", out, "--out", tmp_path / "run", "--preset", "cifar10")
    assert (code, "(--no-flip)" in noted) == (2, True)


def test_networks_take_the_channels_of_latents(
    turned: tuple[ImageStore, ImageStore, Turned, Path], tmp_path: Path
) -> None:
    _, store, _, _ = turned
    config = resolve("digits", {"steps": 3, "batch": 4, "channels": "8,16", "head_dim": 8, "sample_every": 0})
    result = train(store, tmp_path / "run", config)
    learned = nnflow.LearnedVelocity.open(result.folder, device="cpu")
    assert learned.shape == (4, 3, 3)
    assert nnflow.sample(learned, range(2), steps=3).shape == (2, 4, 3, 3)
    wide = resolve("cifar10", {"channels": "8,16,16,16", "head_dim": 8, "flip": False})
    for shape in [(4, 32, 32), (12, 8, 8), (5, 3, 7)]:
        network = build(wide, shape).eval()
        x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        assert network(x, 0.5).shape == x.shape
