"""evaluate(): known errors come back, pairs are what they claim, and the null is counted."""

import json
import math

import pytest
import torch
from stores import store_of

from nnflow.errors import InputError
from nnflow.evaluation import TIMES, evaluate
from nnflow.velocity import EmpiricalVelocity

N, SHAPE, D = 14, (3, 4, 4), 48


def pixels(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    classes = ["a"] * 5 + ["b"] * 9
    return store_of(pixels(N, 0), tmp_path_factory.mktemp("train"), classes=classes)


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Nine images, two of which are in the training set."""
    images = torch.cat([pixels(7, 1), pixels(N, 0)[[3, 11]]])
    classes = ["b"] * 4 + ["a"] * 5
    return store_of(images, tmp_path_factory.mktemp("held-out"), classes=classes)


def distances(images, store):
    """L2 (B, n) in float64, by difference."""
    stored = store.images(torch.arange(len(store))).double().flatten(1)
    return (images.double().flatten(1)[:, None] - stored).norm(dim=2)


class Spy:
    """Calls `field` and remembers the queries."""

    def __init__(self, field):
        self.field, self.calls = field, []

    def __call__(self, x, t, *label):
        self.calls.append((x.clone(), t, *label))
        return self.field(x, t, *label)


def zero(x, t, *label):
    return torch.zeros_like(x)


# ----- the error of a velocity


def test_a_constant_offset_comes_back_as_its_square(store):
    """u_theta = u* + c errs by mean(c^2), whatever t; its other figures follow from |u*| alone."""
    exact = EmpiricalVelocity.exact(store, device="cpu")
    offset = torch.linspace(-1, 2, D).reshape(SHAPE)
    learned = Spy(lambda x, t: exact(x, t) + offset)
    found = evaluate(store, learned=learned, times=(0.0, 0.3, 0.9), pairs=20).error
    assert found.mean_squared == pytest.approx([offset.square().mean().item()] * 3, rel=1e-4)
    assert (found.times, found.pairs) == ((0.0, 0.3, 0.9), 20)
    for i, (x, t) in enumerate(learned.calls):
        reference = exact(x, t).flatten(1).double()
        relative = (offset.norm() / reference.norm(dim=1)).sort().values
        assert found.relative_p50[i] == pytest.approx(float(relative[9:11].mean()), rel=1e-4)
        both = torch.nn.functional.cosine_similarity(reference, reference + offset.flatten())
        assert found.cosine[i] == pytest.approx(float(both.mean()), abs=1e-6)


def test_the_closed_form_of_two_images_has_no_error(tmp_path):
    """Black and white: m = tanh(t sum(x) / (1-t)^2) in every pixel, on paper."""
    two = store_of(torch.tensor([0, 255]).byte().reshape(2, 1, 1, 1).expand(2, 1, 4, 4), tmp_path)

    def on_paper(x, t):
        total = x.double().sum((1, 2, 3), keepdim=True)
        return ((torch.tanh(t * total / (1 - t) ** 2) - x) / (1 - t)).float()

    found = evaluate(two, learned=on_paper, pairs=40, held_out=torch.zeros(3, 1, 4, 4))
    for error in (found.error, found.held_out_error):
        assert error.times == TIMES
        assert max(error.mean_squared) < 1e-8
        assert max(error.relative_p90) < 1e-5
        assert min(error.cosine) > 1 - 1e-9


def test_the_given_field_is_the_reference(store):
    found = evaluate(store, learned=lambda x, t: x + 3, field=lambda x, t: x, pairs=3, times=(0.5,))
    assert found.error.mean_squared == pytest.approx((9.0,))


def clean_images(calls, shape=SHAPE):
    """x0, and x1 at each time, recovered from the queries: x_t = (1 - t) x0 + t x1."""
    x0 = next(x for x, t, *_ in calls if t == 0)
    return x0, [(x - (1 - t) * x0) / t for x, t, *_ in calls if t > 0]


def test_queries_lie_on_paths_to_training_images(store):
    spy = Spy(zero)
    evaluate(store, learned=spy, pairs=30, times=(0.0, 0.25, 0.5, 0.75))
    x0, ends = clean_images(spy.calls)
    apart = distances(ends[0], store)
    assert apart.min(1).values.max() < 1e-4
    assert len(apart.argmin(1).unique()) > N // 2  # and not always to the same one
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-5, rtol=0)
    assert abs(float(x0.mean())) < 0.1
    assert abs(float(x0.std()) - 1) < 0.1
    assert len(x0.flatten(1).unique(dim=0)) == 30


def test_held_out_pairs_share_the_noise_and_not_the_images(store, held_out):
    spy = Spy(zero)
    found = evaluate(store, learned=spy, held_out=held_out, pairs=25, times=(0.0, 0.5))
    train, held = spy.calls[:2], spy.calls[2:]
    assert torch.equal(train[0][0], held[0][0])
    _, (end,) = clean_images(held)
    assert distances(end, held_out).min(1).values.max() < 1e-4
    assert found.held_out_error != found.error


def test_results_do_not_depend_on_memory_and_do_on_seed(store, held_out):
    def measure(memory, seed):
        return evaluate(
            store,
            samples=held_out.images(torch.arange(9)) * 0.9,
            held_out=held_out,
            learned=lambda x, t: 0.5 * x,
            field=lambda x, t: x.abs(),  # row by row: a sum over images rounds by the block
            times=(0.1, 0.6),
            pairs=10,
            seed=seed,
            memory=memory,
        ).to_dict()

    one_pair = 512 * 4 * D
    assert json.dumps(measure(3 * one_pair, 5)) == json.dumps(measure(1 << 30, 5))
    assert measure(1 << 30, 5)["error"] != measure(1 << 30, 6)["error"]


def test_pairs_come_in_blocks_that_fit(store):
    spy = Spy(zero)
    evaluate(store, learned=spy, field=zero, pairs=10, times=(0.0, 0.5), memory=3 * 512 * 4 * D + 100)
    assert [len(x) for x, _ in spy.calls] == [3, 3, 3, 3, 3, 3, 1, 1]


def test_labels_are_those_of_the_images(store, held_out):
    spy = Spy(zero)
    exact = EmpiricalVelocity.exact(store, device="cpu")
    evaluate(
        store,
        learned=spy,
        field=exact,
        held_out=held_out,
        pairs=12,
        times=(0.0, 0.5),
        conditional=True,
    )
    for source, calls in ((store, spy.calls[:2]), (held_out, spy.calls[2:])):
        _, (end,) = clean_images(calls)
        which = distances(end, source).argmin(1)
        assert torch.equal(calls[1][2], source.labels[which])


def test_a_conditional_copy_of_the_field_has_no_error(store):
    exact = EmpiricalVelocity.exact(store, device="cpu")
    found = evaluate(store, learned=exact, pairs=9, times=(0.05, 0.5), conditional=True).error
    assert found.mean_squared == (0.0, 0.0)
    blind = evaluate(
        store, learned=lambda x, t, label: exact(x, t), pairs=9, times=(0.05,), conditional=True
    ).error
    assert blind.mean_squared[0] > 1e-4


# ----- how near


def test_copies_midpoints_and_the_null(store, held_out):
    images = store.images(torch.arange(N))
    samples = torch.cat([images[:4], (images[:6] + images[6:12]) / 2])
    found = evaluate(store, samples=samples, held_out=held_out)
    assert (found.samples.memorised.memorised, found.samples.memorised.images) == (4, 10)
    assert found.samples.copies == 4
    assert (found.held_out.memorised.memorised, found.held_out.memorised.images) == (2, 9)
    assert found.held_out.copies == 2
    assert found.error is None
    assert found.held_out_error is None


def test_copies_are_counted_in_bytes(store):
    """Near a training image is memorised; a copy is the same file."""
    image = store.images(torch.tensor([2]))
    nearly = image.clone()
    nearly[0, 1, 2, 3] -= math.copysign(1 / 127.5, float(nearly[0, 1, 2, 3]))
    noisy = image + 1e-4  # rounds to the same bytes
    found = evaluate(store, samples=torch.cat([image, nearly, noisy])).samples
    assert (found.memorised.memorised, found.copies) == (3, 2)


def test_histograms_hold_every_image_on_shared_edges(store, held_out):
    found = evaluate(store, samples=torch.zeros(33, *SHAPE), held_out=held_out)
    assert sum(found.samples.histogram.counts) == 33
    assert sum(found.held_out.histogram.counts) == 9
    assert found.samples.histogram.edges == found.held_out.histogram.edges
    assert found.held_out.histogram.counts[0] == 2  # the copies, at distance 0
    centre = torch.zeros(D)
    nearest = (store.images(torch.arange(N)).flatten(1) - centre).norm(dim=1).min()
    edges = torch.tensor(found.samples.histogram.edges)
    place = int((edges <= nearest).sum()) - 1
    assert found.samples.histogram.counts[min(place, 39)] == 33


def test_held_out_as_store_and_as_tensor_agree(store, held_out):
    tensor = held_out.images(torch.arange(9))

    def measure(images):
        return evaluate(store, held_out=images, learned=zero, pairs=8, times=(0.2,)).to_dict()

    assert measure(held_out) == measure(tensor)


def test_caller_keeps_its_samples(store):
    samples = store.images(torch.arange(5))
    before = samples.clone()
    evaluate(store, samples=samples, held_out=samples, learned=zero, pairs=4, times=(0.5,))
    assert torch.equal(samples, before)


# ----- the result


def test_the_dictionary_is_json_with_counts_and_seeds(store, held_out):
    found = evaluate(
        store,
        samples=torch.zeros(3, *SHAPE),
        held_out=held_out,
        learned=zero,
        pairs=6,
        seed=7,
        sample_seeds=range(4, 7),
        times=(0.0, 0.5),
    )
    plain = found.to_dict()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert (again["n"], again["d"], again["shape"]) == (N, D, list(SHAPE))
    assert (again["seed"], again["sample_seeds"]) == (7, [4, 5, 6])
    assert again["fingerprint"] == store.fingerprint
    assert again["samples"]["memorised"]["images"] == 3
    assert again["samples"]["memorised"]["ratio"] == pytest.approx(1 / 3)
    assert again["held_out"]["memorised"]["images"] == 9
    assert again["error"]["pairs"] == again["held_out_error"]["pairs"] == 6
    assert again["error"]["times"] == [0.0, 0.5]


def test_what_was_not_asked_for_is_none(store):
    plain = evaluate(store, samples=torch.zeros(3, *SHAPE)).to_dict()
    assert [plain[name] for name in ("held_out", "error", "held_out_error")] == [None] * 3


def test_bars_on_the_standard_error_only_when_asked(store, capfd):
    evaluate(store, samples=torch.zeros(3, *SHAPE), learned=zero, pairs=2, times=(0.5,))
    assert capfd.readouterr() == ("", "")
    evaluate(store, samples=torch.zeros(3, *SHAPE), learned=zero, pairs=2, times=(0.5,), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "nearest of samples" in err
    assert "error on training images" in err


# ----- bad input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to evaluate"),
        ({"samples": torch.zeros(3, 1, 4, 4)}, r"samples are \(1, 4, 4\).*\(3, 4, 4\)"),
        ({"samples": torch.zeros(3, 4, 4)}, r"samples of shape \(3, 4, 4\)"),
        ({"samples": torch.zeros(3, *SHAPE, dtype=torch.uint8)}, "torch.uint8"),
        ({"samples": torch.zeros(0, *SHAPE)}, "no samples"),
        ({"samples": torch.full((2, *SHAPE), math.nan)}, "samples: image 0 holds NaN"),
        ({"held_out": torch.zeros(3, 3, 5, 5)}, "held-out images are"),
        ({"learned": zero, "times": (0.5, 1.0)}, "time 1: wanted"),
        ({"learned": zero, "times": (math.nan,)}, "time nan: wanted"),
        ({"learned": zero, "times": ()}, "no times"),
        ({"learned": zero, "pairs": 0}, "pairs 0"),
        ({"learned": lambda x, t: x / 0, "times": (0.5,)}, r"u_theta returned NaN.*t = 0.5"),
        (
            {"learned": zero, "field": lambda x, t: x * math.nan, "times": (0.25,)},
            r"u\* returned NaN.*t = 0.25",
        ),
        (
            {"learned": zero, "conditional": True, "held_out": torch.zeros(2, *SHAPE)},
            "no classes",
        ),
    ],
)
def test_bad_input_is_told_in_one_line(store, arguments, said):
    with pytest.raises(InputError, match=said) as caught:
        evaluate(store, **arguments)
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused(store, tmp_path):
    other = store_of(pixels(2, 5), tmp_path, classes=["a", "c"])
    with pytest.raises(InputError, match="same classes"):
        evaluate(store, learned=zero, held_out=other, conditional=True, pairs=2, times=(0.5,))


def test_one_stored_image_has_no_second_neighbour(tmp_path):
    alone = store_of(pixels(1, 0), tmp_path)
    with pytest.raises(InputError, match="1 image stored"):
        evaluate(alone, samples=torch.zeros(2, *SHAPE))
    assert evaluate(alone, learned=zero, pairs=2, times=(0.5,)).samples is None
