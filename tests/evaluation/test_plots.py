import numpy as np
import pytest
from matplotlib.image import imread

from effjax.evaluation import plots

POSITIONS = {
    "start": np.array([0, 1, 3]),
    "stop": np.array([1, 3, 8]),
    "loss": np.array([3.0, 2.5, 2.0]),
    "bits_per_byte": np.array([4.3, 3.6, 2.9]),
    "tokens": np.array([10, 20, 50]),
}


def curve(best_cheap_recall):
    full = [("full", (4,), 0.3, 400), ("full", (16,), 0.6, 1600)]
    rows = [*full, ("adaptive", (4, 16), best_cheap_recall, 800), ("funnel", (4, 8, 16), 0.4, 600)]
    names = ("method", "dims", "recall", "multiply_adds")
    return [dict(zip(names, row, strict=True)) | {"k": k} for row in rows for k in (1, 5)]


def drawn(figure, path):
    """Writes the figure and checks that something with more than one colour is on it."""
    plots.save(figure, path)
    pixels = imread(path)
    assert (
        pixels.shape[:2] == tuple(round(150 * inches) for inches in figure.get_size_inches())[::-1]
    )
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    return figure.axes


@pytest.mark.parametrize(
    ("figure", "x", "y"),
    [
        (plots.histogram({1.0: 6, 2.0: 3, 3.0: 1}, "recursions", "Depth"), "recursions", "tokens"),
        (plots.recall_by_dimension(curve(0.6)), "dimensions", "recall"),
        (plots.adaptive_retrieval(curve(0.6), 1), "multiply-adds", "recall@1"),
        (
            plots.recall_by_distance(
                {
                    "start": np.array([1, 4]),
                    "stop": np.array([4, 9]),
                    "accuracy": np.array([1, 0.5]),
                },
                0.75,
            ),
            "tokens",
            "right",
        ),
    ],
)
def test_charts_are_labelled_pictures(figure, x, y, tmp_path):
    (axes,) = drawn(figure, tmp_path / "chart.png")
    assert x in axes.get_xlabel()
    assert y in axes.get_ylabel()
    assert axes.get_title()


def test_loss_by_position_draws_the_numbers_and_the_baselines(tmp_path):
    figure = plots.loss_by_position(POSITIONS, {"unigram": 4.7})
    loss, bits = drawn(figure, tmp_path / "chart.png")
    assert "nats per token" in loss.get_ylabel()
    assert "bits per byte" in bits.get_ylabel()
    for axes, name in ((loss, "loss"), (bits, "bits_per_byte")):
        np.testing.assert_array_equal(axes.patches[0].get_data().values, POSITIONS[name])
        np.testing.assert_array_equal(axes.patches[0].get_data().edges, [1, 2, 4, 9])
    assert bits.lines[0].get_ydata()[0] == 4.7
    title = figure.get_suptitle()
    assert "3.00 with 1, 2.00 with 4 to 8 tokens" in title


def test_loss_by_position_without_bytes_has_one_panel(tmp_path):
    table = POSITIONS | {"bits_per_byte": np.full(3, np.nan)}
    assert len(drawn(plots.loss_by_position(table), tmp_path / "chart.png")) == 1


def test_histogram_is_of_shares():
    (axes,) = plots.histogram({3.0: 1, 1.0: 6, 2.0: 3}, "recursions", "Depth").axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.6, 0.3, 0.1])
    assert axes.get_title() == "Depth: 1.50 on average"


def test_adaptive_retrieval_says_what_is_saved():
    (axes,) = plots.adaptive_retrieval(curve(0.6), 1).axes
    assert "1/2.0 of its multiply-adds" in axes.get_title()
    (axes,) = plots.adaptive_retrieval(curve(0.5), 1).axes
    assert axes.get_title().startswith("Nothing cheaper")
