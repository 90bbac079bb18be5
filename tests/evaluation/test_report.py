import dataclasses
import json

import numpy as np
import pytest

from effjax.evaluation import report


@dataclasses.dataclass
class Numbers:
    median: np.float32
    counts: np.ndarray


REPORT = {
    "model": "mor",
    "step": None,
    "heldout": {"loss": float("nan"), "inner": {"x": np.int64(12345)}, "curve": [{"y": np.inf}]},
    "numbers": Numbers(np.float32(0.5), np.array([[1.0, np.nan]])),
    "flag": True,
}


def test_json_is_valid_without_nan(tmp_path):
    report.write(REPORT, tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {
        "model": "mor",
        "step": None,
        "heldout": {"loss": None, "inner": {"x": 12345}, "curve": [{"y": None}]},
        "numbers": {"median": 0.5, "counts": [[1.0, None]]},
        "flag": True,
    }


def test_table_has_every_number_and_no_list(tmp_path):
    text = report.write(REPORT, tmp_path)
    assert text == (tmp_path / "report.txt").read_text()
    rows = dict(line.split() for line in text.splitlines() if len(line.split()) == 2)
    assert rows == {
        "model": "mor",
        "step": "-",
        "loss": "-",
        "inner.x": "12,345",
        "median": "0.5",
        "flag": "True",
    }


def test_a_failed_write_leaves_the_old_report(tmp_path):
    report.write({"model": "old"}, tmp_path)
    with pytest.raises(TypeError):
        report.write({"model": object()}, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == {"model": "old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (2.0, "2"),
        (1.23456, "1.235"),
        (12345.67, "12,346"),
        (1e-6, "1e-06"),
        (-0.5, "-0.5"),
        (None, "-"),
        (False, "False"),
        ("4 x 4", "4 x 4"),
    ],
)
def test_readable(value, text):
    assert report.readable(value) == text
