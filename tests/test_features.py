"""Extractors: what images reach them as, and what is refused of them."""

import warnings

import pytest
import torch
from refusals import refused
from stores import store_of
from torch import nn

from nnflow.errors import InputError, StoreError
from nnflow.features import Pixels, PrincipalCoordinates, Scripted, feature_blocks
from nnflow.fitting import fit_embedding
from nnflow.store import to_float


def pixels(count, channels=3, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


class AsGiven(nn.Module):
    """Every value it is given: what reached the network can be read off."""

    def forward(self, x):
        return x.flatten(1)


class Inception(nn.Module):
    """The two answers of NVIDIA's file."""

    def forward(self, x, return_features: bool = False):
        pooled = x.mean((2, 3))
        return pooled if return_features else pooled.softmax(1).repeat(1, 7)


class Maps(nn.Module):
    def forward(self, x):
        return x


class Large(nn.Module):
    def forward(self, x):
        return x.reshape(x.shape[0], 3 * 224 * 224)


def scripted(module, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(folder / "net.pt")
    return Scripted.open(folder / "net.pt")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return store_of(pixels(30), tmp_path_factory.mktemp("train"))


# ----- a network in a file


def test_a_network_gets_whole_numbers_in_three_colours(tmp_path):
    net = scripted(AsGiven(), tmp_path)
    colour, grey = pixels(5), pixels(5, channels=1)
    found = net(to_float(colour))
    assert torch.equal(found, colour.flatten(1).float())
    assert found.dtype == torch.float32
    assert torch.equal(net(to_float(grey)), grey.repeat(1, 3, 1, 1).flatten(1).float())


def test_return_features_is_asked_for(tmp_path):
    images = pixels(6)
    found = scripted(Inception(), tmp_path)(to_float(images))
    torch.testing.assert_close(found, images.float().mean((2, 3)))


def test_a_file_is_known_by_its_bytes(tmp_path):
    one, same = scripted(AsGiven(), tmp_path), Scripted.open(tmp_path / "net.pt")
    assert one.identity == same.identity
    assert one.identity["file"] == "net.pt"
    assert one.identity["digest"] != scripted(Inception(), tmp_path).identity["digest"]


def test_what_a_file_may_not_be(tmp_path):
    with refused(StoreError, "no such file.*TorchScript"):
        Scripted.open(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("no network")
    with refused(StoreError, "not TorchScript"):
        Scripted.open(tmp_path / "text.pt")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    with refused(StoreError, "not TorchScript"):
        Scripted.open(tmp_path / "weights.pt")


def test_what_a_network_may_not_do(tmp_path):
    with refused(InputError, r"answers 2 images with \(2, 3, 4, 4\): wanted \(2, F\)"):
        scripted(Maps(), tmp_path)(to_float(pixels(2)))
    with refused(InputError, r"fails on float32 \(2, 3, 4, 4\) in 0 to 255"):
        scripted(Large(), tmp_path)(to_float(pixels(2)))
    with refused(InputError, "2 channels"):
        scripted(AsGiven(), tmp_path)(to_float(pixels(2, channels=2)))


# ----- PCA


def test_all_coordinates_keep_every_distance(store):
    """Of 30 images every difference lies in 29 directions."""
    embedding = fit_embedding(store, rank=8, budget=1 << 30)
    images = store.images(torch.arange(30))
    turned = PrincipalCoordinates.leading(embedding, 30)(images)
    plain = Pixels(store.shape[1:])(images)
    apart = [torch.cdist(rows.double(), rows.double()) for rows in (turned, plain)]
    torch.testing.assert_close(*apart, atol=1e-5, rtol=1e-5)
    few = PrincipalCoordinates.leading(embedding, 5)
    torch.testing.assert_close(few(images), turned[:, :5])
    assert few(images).mean(0).abs().max() < 1e-5
    variances = few(images).var(0, unbiased=False)
    torch.testing.assert_close(variances, embedding.spectrum[:5], rtol=1e-3, atol=0)
    assert PrincipalCoordinates.leading(embedding).coordinates == 30
    assert few.identity["coordinates"] == 5


def test_other_images_and_too_many_coordinates(store):
    embedding = fit_embedding(store, rank=8, budget=1 << 30)
    with refused(InputError, "31 PCA coordinates.*30"):
        PrincipalCoordinates.leading(embedding, 31)
    with refused(InputError, "images of 75 values"):
        PrincipalCoordinates.leading(embedding)(torch.zeros(2, 3, 5, 5))


# ----- blocks


def test_samples_are_rounded_and_come_in_the_order_asked(store):
    images = store.images(torch.arange(30))
    extractor, ids = Pixels(store.shape[1:]), torch.tensor([4, 2, 29, 0])
    finer = images + 0.3 / 127.5
    for given in (store, images, finer):
        assert torch.equal(torch.cat(list(feature_blocks(extractor, given, ids))), images[ids].flatten(1))


def test_blocks_fit_the_memory(store):
    extractor = Pixels(store.shape[1:])
    blocks = list(
        feature_blocks(extractor, store, torch.arange(30), memory=2 * 7 * extractor.bytes_per_image)
    )
    assert [len(block) for block in blocks] == [7, 7, 7, 7, 2]


class Broken(Pixels):
    def __call__(self, images):
        return images.flatten(1) / 0


def test_infinite_features_are_refused(store):
    with refused(InputError, "NaN or infinity"):
        list(feature_blocks(Broken(store.shape[1:]), store, torch.arange(3)))
