import html
import re

import numpy as np
import pytest
from matplotlib.image import imread

from effjax.evaluation.heatmap import Scale, text_heatmap
from effjax.evaluation.text_grid import Passage

WEIRD = bytes(range(256)) + b"\n\ttext <b>&amp; $x^2$ \\n\n" + "é€😀".encode()


def passage(text, values):
    return Passage([bytes([byte]) for byte in text], np.asarray(values))


def test_weird_bytes_become_a_picture_and_a_page(rng, tmp_path):
    values = rng.integers(1, 4, len(WEIRD))
    paths = text_heatmap(
        [passage(WEIRD, values)],
        tmp_path / "text.png",
        title="A <title> & $more",
        label="recursions",
    )
    assert [path.name for path in paths] == ["text.png", "text.html"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.html", "text.png"]
    width = imread(paths[0]).shape[1]
    assert width == pytest.approx((96 * 0.09 + 0.6) * 150, abs=2)
    page = paths[1].read_text("utf-8")
    assert "A &lt;title&gt; &amp; $more" in page
    text = html.unescape(re.sub("<[^>]*>", "", page.split("<pre>")[1].split("</pre>")[0]))
    assert "text <b>&amp; $x^2$ \\n" in text
    assert "\\xF0" in text
    assert "http" not in page  # needs nothing else


def test_the_colour_of_a_byte_is_its_number(tmp_path):
    text_heatmap(
        [passage(b"  ", [1, 3])], tmp_path / "text.png", title="", label="", columns=2, max_rows=1
    )
    pixels = imread(tmp_path / "text.png")[..., :3]
    middle = pixels.shape[0] - round((0.3 + 0.09) * 150)
    scale = Scale([1, 3])
    for column, value in ((0, 1), (1, 3)):
        at = round((0.3 + 0.09 * (column + 0.5)) * 150)
        np.testing.assert_allclose(pixels[middle, at], scale(value), atol=0.02)


def test_few_whole_numbers_are_classes_and_others_a_scale():
    assert Scale([1.0, 3.0]).classes == [1, 2, 3]
    assert Scale([2.0]).classes == [2]
    assert Scale([0.5, 1.0]).classes is None
    assert Scale([0.0, 40.0]).classes is None
    colours = [Scale([1, 2, 3])(value) for value in (1, 2, 3)]
    assert len(set(colours)) == 3


@pytest.mark.parametrize("value", np.linspace(0, 1, 11))
def test_black_text_contrasts_with_every_background(value):
    background = Scale([0.0, 0.5, 1.0])(value)
    linear = [((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in background]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert (luminance + 0.05) / 0.05 >= 7  # WCAG 2.1, level AAA


def test_no_text_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no text"):
        text_heatmap([], tmp_path / "text.png", title="", label="")
