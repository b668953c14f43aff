"""The picture of a calibration: read back from its file."""

import numpy as np
import pytest
from PIL import Image

from nnflow.calibration import Calibration, Entry, Quantiles
from nnflow.curves import calibration_curves, drawn_ladders
from nnflow.errors import InputError

BLUE, ORANGE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
TIMES = (0.01, 0.1, 0.3, 0.9)


def made_up(errors, milliseconds=None):
    """The p99 of each ladder at `TIMES` (None: not measured), and of the exact field."""
    errors = {"exact": (0.0,) * len(TIMES)} | errors
    prices = {"exact": 10.0} | (milliseconds or {})
    entries = [
        Entry(t, name, prices.get(name, 1.0) / 1000, Quantiles(0.0, 0.0, p99, p99, 200), None)
        for name, values in errors.items()
        for t, p99 in zip(TIMES, values, strict=True)
        if p99 is not None
    ]
    return Calibration(tuple(entries), "an index", {}, {})


def drawn(calibration, folder, tolerance=0.01):
    calibration_curves(calibration, folder / "x.png", tolerance=tolerance)
    with Image.open(folder / "x.png") as image:
        assert (image.format, image.mode, image.info) == ("PNG", "RGB", {})
        return np.asarray(image)


def inked(picture, colour):
    """(y, x) of the pixels of exactly this colour below the key."""
    where = (picture == colour).all(-1)
    where[:270] = False
    return where.nonzero()


def grey_band(picture):
    """Columns shaded from top to bottom of the axes, lines of the grid left out."""
    rows = picture[300:880:20].astype(int)
    shade = (rows.max(-1) - rows.min(-1) == 0) & (rows[..., 0] > 190) & (rows[..., 0] < 230)
    wide = np.convolve(shade.mean(0) > 0.8, np.ones(9), mode="same") == 9
    return wide.nonzero()[0]


def test_a_line_stands_at_its_errors(tmp_path):
    """Ten times the error is one decade up, whatever the others; ten times t one decade right."""
    picture = drawn(made_up({"64/9": (1e-4, 1e-3, 1e-3, 1e-3), "128/9": (1e-3, 1e-2, 1e-2, 1e-2)}), tmp_path)
    (y1, x1), (y2, x2) = inked(picture, BLUE), inked(picture, ORANGE)
    assert len(y1) > 300 < len(y2)
    assert (x1.min(), x1.max()) == pytest.approx((x2.min(), x2.max()), abs=8)
    # each line rises by one decade; the second starts where the first ends
    assert y1.max() - y1.min() == pytest.approx(y2.max() - y2.min(), abs=8)
    assert y1.min() == pytest.approx(y2.max(), abs=16)
    middle = (x1 > x1.max() - 200) & (x1 < x1.max() - 20)
    assert y1[middle].max() - y1[middle].min() < 12  # flat on the right


def test_exact_stretches_are_shaded(tmp_path):
    """At .1 and .3 nothing meets the tolerance: from .01 to .9 no ladder does at both ends."""
    errors = {"64/9": (1e-3, 0.5, 0.5, 1e-3)}
    band = grey_band(drawn(made_up(errors), tmp_path))
    assert len(band) > 0.7 * (band.max() - band.min())
    # of log10 t from 0.004 to 1.05 across the axes, 142 to 1455 pixels
    edges = np.log10(np.array([0.01, 0.9]) / 0.004) / np.log10(1.05 / 0.004)
    assert (band.min(), band.max()) == pytest.approx(tuple(142.5 + 1312.5 * edges), abs=12)
    assert len(grey_band(drawn(made_up({"64/9": (1e-3,) * 4}), tmp_path))) == 0


def test_what_is_taken_is_ringed(tmp_path):
    """The rings are at the cheaper ladder, for less tolerance at the finer one."""
    calibration = made_up({"64/9": (0.008,) * 4, "512/9": (0.0005,) * 4}, {"512/9": 3.0})

    def ink(picture, colour):
        """Black pixels within a ring's reach of a line."""
        y, x = inked(picture, (0, 0, 0))
        line = round(np.median(inked(picture, colour)[0]))
        return int(((abs(y - line) < 17) & (x > 160)).sum()), line

    for tolerance, coarse_is_taken in ((0.01, True), (0.001, False)):
        picture = drawn(calibration, tmp_path, tolerance)
        (taken, place), (left, other) = ink(picture, BLUE), ink(picture, ORANGE)  # the plan's come first
        assert taken > 400
        assert left < 50
        assert (place < other) == coarse_is_taken  # the larger error stands higher


def test_at_most_six_ladders_the_plans_first():
    errors = {f"{rank}/9": (1e-3 * rank,) * 4 for rank in (32, 64, 96, 128, 160, 192, 224, 256)}
    errors["512/9"] = (None, None, 1e-3, 1e-3)
    calibration = made_up(errors, {"512/9": 0.5})
    names = drawn_ladders(calibration, calibration.plan(0.05))
    assert len(names) == 6
    assert names[0] == "512/9"  # taken from .3 on, 70 % of t
    assert names[1] == "32/9"
    assert "exact" not in drawn_ladders(calibration, calibration.plan(1e-5))


def test_an_index_for_which_only_the_exact_field_was_measured(tmp_path):
    assert len(grey_band(drawn(made_up({}), tmp_path))) > 1200


def test_errors_of_zero_are_drawn(tmp_path):
    y, _ = inked(drawn(made_up({"64/9": (0.0, 1e-3, 1e-3, 0.0)}), tmp_path), BLUE)
    assert len(y) > 300


def test_the_same_calibration_gives_the_same_bytes(tmp_path):
    for name in "ab":
        calibration_curves(made_up({"64/9": (1e-3,) * 4}), tmp_path / f"{name}.png", tolerance=0.01)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_tolerance_that_is_none_is_refused(tmp_path):
    with pytest.raises(InputError, match="tolerance = 0"):
        calibration_curves(made_up({"64/9": (1e-3,) * 4}), tmp_path / "x.png", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []
