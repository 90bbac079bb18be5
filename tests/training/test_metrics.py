"""What the log says is what the steps measured."""

import dataclasses
import io
import json
import struct

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from effjax.training import curves, metrics
from effjax.training.metrics import Counts, Interval, MetricsLog
from effjax.training.progress import Screen, clock, describe, si


def test_counts_of_a_language_batch(rng):
    token_num_bytes = rng.integers(0, 5, size=11).astype(np.int32)
    targets = rng.integers(11, size=(3, 7)).astype(np.int32)
    mask = rng.integers(2, size=(3, 7)).astype(np.float32)
    segment_ids = rng.integers(3, size=(3, 7)).astype(np.int32)
    batch = {"tokens": targets, "targets": targets, "loss_mask": mask, "segment_ids": segment_ids}
    num_bytes = sum(
        int(token_num_bytes[t]) for t, m in zip(targets.flat, mask.flat, strict=True) if m
    )
    expected = Counts(21, int((segment_ids > 0).sum()), float(mask.sum()), float(num_bytes))
    assert Counts.of(batch, token_num_bytes) == expected


def test_counts_of_a_batch_of_pairs():
    query, document = np.array([[1, 1, 0]]), np.array([[1, 0, 0]])
    batch = {
        "query_tokens": query,
        "query_segment_ids": query,
        "document_tokens": document,
        "document_segment_ids": document,
    }
    assert Counts.of(batch, np.ones(2)) == Counts(positions=6, tokens=3)


def make_steps(rng, count=5):
    return [
        (
            {
                "loss": rng.random(),
                "cross_entropy": rng.random(),
                "flops/spent": 100 * rng.random(),
            },
            Counts(
                64, int(rng.integers(1, 64)), float(rng.integers(1, 64)), float(rng.integers(99))
            ),
            rng.random(),
        )
        for _ in range(count)
    ]


def test_interval_means_and_rates(rng):
    steps = make_steps(rng)
    interval = Interval()
    for step in steps:
        interval.add(*step)
    means = interval.means()
    for name in ("loss", "cross_entropy", "flops/spent"):
        np.testing.assert_allclose(means[name], np.mean([m[name] for m, _, _ in steps]), rtol=1e-12)
    bits = sum(m["cross_entropy"] * c.targets for m, c, _ in steps) / np.log(2)
    np.testing.assert_allclose(means["bits_per_byte"], bits / sum(c.bytes for _, c, _ in steps))
    seconds = sum(s for _, _, s in steps)
    rates = interval.rates()
    np.testing.assert_allclose(
        rates["tokens_per_second"], sum(c.tokens for _, c, _ in steps) / seconds
    )
    # Forward once and backward twice that, on every position of the batch.
    np.testing.assert_allclose(
        rates["flops_per_second"], 3 * sum(m["flops/spent"] * 64 for m, _, _ in steps) / seconds
    )


def test_a_skipped_step_counts_in_no_mean(rng):
    steps = make_steps(rng)
    with_skipped, without = Interval(), Interval()
    for metrics_, counts, seconds in steps:
        without.add(metrics_ | {"skipped": 0.0}, counts, seconds)
        with_skipped.add(metrics_ | {"skipped": 0.0}, counts, seconds)
        with_skipped.add({"loss": np.nan, "skipped": 1.0}, counts, 0.0)
    assert with_skipped.means() == without.means() | {"skipped": len(steps)}
    assert with_skipped.rates() == without.rates()
    nothing_but_skipped = Interval()
    nothing_but_skipped.add({"loss": np.nan, "skipped": 1.0}, steps[0][1], 1.0)
    assert nothing_but_skipped.means() == {"skipped": 1}


def test_counts_come_back_from_sums(rng):
    (_, counts, _) = make_steps(rng, 1)[0]
    assert Counts.from_sums(np.float32(dataclasses.astuple(counts))) == counts


def test_an_interval_survives_json_exactly(rng):
    steps = make_steps(rng, 6)
    whole, first = Interval(), Interval()
    for step in steps:
        whole.add(*step)
    for step in steps[:4]:
        first.add(*step)
    second = Interval(**json.loads(json.dumps(dataclasses.asdict(first))))
    for step in steps[4:]:
        second.add(*step)
    assert second == whole


def test_bits_per_byte_is_absent_where_nothing_is_predicted():
    interval = Interval()
    interval.add({"loss": 1.0}, Counts(8, 8), 1.0)
    assert interval.means() == {"loss": 1.0}
    assert interval.rates() == {"tokens_per_second": 8.0}


def tensorboard_events(workdir):
    for file in sorted((workdir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:  # TFRecord: length, its checksum, the data, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_log_is_json_lines_and_tensorboard(tmp_path):
    with MetricsLog(tmp_path, last_step=0) as log:
        log.write(2, {"loss": 3.5, "odd": float("nan")})
        log.write(4, {"loss": 2.5})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 2, "loss": 3.5, "odd": None}, {"step": 4, "loss": 2.5}]
    values = [
        (event.step, value.tag, value.simple_value)
        for event in tensorboard_events(tmp_path)
        for value in event.summary.value
    ]
    assert (2, "loss", 3.5) in values
    assert (4, "loss", 2.5) in values


def test_a_flushed_line_is_tensorboards_before_the_log_is_closed(tmp_path):
    with MetricsLog(tmp_path, last_step=0) as log:
        log.write(2, {"loss": 3.5})
        log.flush()
        steps = [event.step for event in tensorboard_events(tmp_path) if event.summary.value]
        assert steps == [2]


def test_a_log_that_goes_on_drops_what_the_checkpoint_does_not_cover(tmp_path):
    with MetricsLog(tmp_path, last_step=0) as log:
        for step in (2, 4, 6):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    assert [line["step"] for line in metrics.read(tmp_path)] == [2, 4, 6]
    with MetricsLog(tmp_path, last_step=4) as log:
        log.write(6, {"loss": 60.0})
    assert metrics.read(tmp_path) == [
        {"step": 2, "loss": 2.0},
        {"step": 4, "loss": 4.0},
        {"step": 6, "loss": 60.0},
    ]


def test_no_log_has_no_lines(tmp_path):
    assert metrics.read(tmp_path) == []


def test_curve_is_a_picture_of_the_lines(tmp_path):
    lines = [
        {"step": 5, "bits_per_byte": 6.0},
        {"step": 10, "bits_per_byte": 4.0, "heldout/bits_per_byte": 4.5},
    ]
    path = curves.draw(tmp_path, lines)
    plain = imread(path)
    assert np.ptp(plain) > 0.5
    with_levels = imread(curves.draw(tmp_path, lines, {"unigram": 5.0}))
    assert not np.array_equal(plain, with_levels)


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert curves.draw(tmp_path, []) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 "), (7, "7 "), (999.4, "999 "), (999.9, "1 k"), (12_345, "12.3 k"), (4.56e9, "4.56 G")],
)
def test_si(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3661, "1:01:01")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_a_line_says_what_the_model_spends():
    values = {
        "loss": 2.0,
        "bits_per_byte": 1.5,
        "depth/mean_recursions": 1.25,
        "moe/fraction_dropped": 0.031,
        "flops/spent": 30e3,
        "flops/full": 40e3,
        "tokens_per_second": 5e3,
        "unknown": 1.0,
    }
    assert describe(values) == [
        "loss 2.000",
        "bits/byte 1.500",
        "recursions 1.25",
        "dropped 3.1%",
        "30 kFLOP/token (75% of dense)",
        "5 ktokens/s",
    ]


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Screen(200, Console(file=out)) as screen:
        screen.advance(5)
        screen.show(5, {"loss": 2.0}, seconds_per_step=0.5)
        screen.say("[not markup]")
    assert out.getvalue() == "step   5/200  loss 2.000  1:38 left\n[not markup]\n"
