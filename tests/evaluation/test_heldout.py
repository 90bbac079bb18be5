import jax
import numpy as np
import pytest
from table_model import TableModel, text_batch

from effjax import models
from effjax.evaluation.heldout import (
    evaluate_language_model,
    geometric_edges,
    make_eval_step,
    token_losses,
)

VOCAB = 23


def reference(table, batches, token_num_bytes):
    """Loss, targets and bytes at each position by a loop over targets, in float64."""
    length = max(batch["tokens"].shape[1] for batch in batches)
    sums = np.zeros((3, length))
    for batch in batches:
        for row, column in zip(*np.nonzero(batch["loss_mask"]), strict=True):
            logits = table[batch["tokens"][row, column]].astype(np.float64)
            target = batch["targets"][row, column]
            loss = np.log(np.sum(np.exp(logits - logits.max()))) + logits.max() - logits[target]
            sums[:, batch["positions"][row, column]] += [loss, 1, token_num_bytes[target]]
    return sums


@pytest.fixture
def case(rng):
    table = rng.normal(0, 3, (VOCAB, VOCAB)).astype(np.float32)
    batches = [text_batch(rng, 3, 9, VOCAB), text_batch(rng, 5, 14, VOCAB)]
    token_num_bytes = rng.integers(0, 5, VOCAB).astype(np.int32)
    return TableModel(VOCAB), {"params": {"table": table}}, batches, token_num_bytes


def test_sums_are_those_of_a_float64_loop(case):
    model, variables, batches, token_num_bytes = case
    found = evaluate_language_model(model, variables, batches, token_num_bytes)
    loss, tokens, num_bytes = reference(variables["params"]["table"], batches, token_num_bytes)
    np.testing.assert_allclose(found.loss_sums, loss, rtol=1e-5)
    np.testing.assert_array_equal(found.token_counts, tokens)
    np.testing.assert_array_equal(found.byte_counts, num_bytes)
    np.testing.assert_allclose(found.loss, loss.sum() / tokens.sum(), rtol=1e-6)
    expected = loss.sum() / np.log(2) / num_bytes.sum()
    np.testing.assert_allclose(found.bits_per_byte, expected, rtol=1e-6)


def test_metrics_are_means_over_input_tokens(case):
    model, variables, batches, token_num_bytes = case
    found = evaluate_language_model(model, variables, batches, token_num_bytes)
    weights = [np.count_nonzero(batch["segment_ids"]) for batch in batches]
    means = [batch["tokens"].mean() for batch in batches]
    np.testing.assert_allclose(
        found.metrics["flops/spent"], np.average(means, weights=weights), rtol=1e-6
    )
    assert found.metrics["flops/full"] == pytest.approx(7.0)
    assert set(found.metrics) == {"flops/spent", "flops/full"}  # nothing that is [B, T]


def test_uniform_model_needs_log2_of_the_vocabulary(rng):
    batch = text_batch(rng, 4, 12, 260)
    batch["targets"] %= 256
    found = evaluate_language_model(
        TableModel(260),
        {"params": {"table": np.zeros((260, 260), np.float32)}},
        [batch],
        (np.arange(260) < 256).astype(np.int32),
    )
    assert found.bits_per_byte == pytest.approx(np.log2(260), rel=1e-6)


def test_padding_rows_change_nothing(rng):
    model = models.create("transformer", vocab_size=VOCAB, d_model=16, num_layers=2)
    batch = text_batch(rng, 3, 8, VOCAB)
    variables = jax.jit(model.init)(jax.random.key(0), batch["tokens"])
    padded = {name: np.concatenate([x, np.zeros_like(x[:2])]) for name, x in batch.items()}
    padded["tokens"][-2:] = VOCAB - 1
    ones = np.ones(VOCAB, np.int32)
    without = evaluate_language_model(model, variables, [batch], ones)
    found = evaluate_language_model(model, variables, [padded], ones)
    np.testing.assert_allclose(found.loss_sums, without.loss_sums, rtol=1e-5)
    np.testing.assert_array_equal(found.token_counts, without.token_counts)
    np.testing.assert_array_equal(found.byte_counts, without.byte_counts)
    assert found.metrics == pytest.approx(without.metrics)


def test_masked_targets_count_for_nothing_even_if_not_finite(rng):
    logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
    logits[0, 1] = np.nan
    mask = np.ones((2, 3), np.float32)
    mask[0, 1] = 0
    losses = np.asarray(token_losses(logits, np.zeros((2, 3), np.int32), mask))
    assert losses[0, 1] == 0
    assert np.isfinite(losses).all()


def test_batches_and_variables_may_live_on_a_mesh(case):
    model, variables, batches, token_num_bytes = case
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    moved = [jax.device_put(batch, whole) for batch in batches]
    found = evaluate_language_model(
        model, jax.device_put(variables, whole), moved, token_num_bytes, output_sharding=whole
    )
    on_host = evaluate_language_model(model, variables, batches, token_num_bytes)
    np.testing.assert_allclose(found.loss_sums, on_host.loss_sums, rtol=1e-6)


@pytest.mark.parametrize("num_bins", [None, 1, 4, 100])
def test_by_position_adds_up_to_the_whole(case, num_bins):
    model, variables, batches, token_num_bytes = case
    found = evaluate_language_model(model, variables, batches, token_num_bytes)
    table = found.by_position(num_bins)
    assert np.sum(table["tokens"]) == found.token_counts.sum()
    np.testing.assert_allclose(np.sum(table["loss"] * table["tokens"]), found.loss_sums.sum())
    assert (table["start"] < table["stop"]).all()
    assert (table["stop"][:-1] <= table["start"][1:]).all()
    if num_bins is not None:
        assert len(table["loss"]) <= num_bins


def test_bits_per_byte_is_none_without_bytes(case):
    model, variables, batches, _ = case
    found = evaluate_language_model(model, variables, batches, np.zeros(VOCAB, np.int32))
    assert found.bits_per_byte is None
    assert np.isnan(found.by_position()["bits_per_byte"]).all()


@pytest.mark.parametrize("length", [1, 2, 7, 256, 1000])
@pytest.mark.parametrize("num_bins", [1, 3, 24])
def test_geometric_edges_cover_every_position(length, num_bins):
    edges = geometric_edges(length, num_bins)
    widths = np.diff(edges)
    assert edges[0] == 0
    assert edges[-1] == length
    assert (widths > 0).all()
    assert len(widths) <= num_bins


def test_one_step_is_kept_for_a_model():
    def create():
        return models.create("transformer", d_model=16, num_layers=2)

    assert make_eval_step(create()) is make_eval_step(create())


def test_nothing_to_evaluate_is_an_error(case):
    model, variables, batches, token_num_bytes = case
    batches[0]["loss_mask"][:] = 0
    with pytest.raises(ValueError, match="loss_mask"):
        evaluate_language_model(model, variables, batches[:1], token_num_bytes)
    with pytest.raises(ValueError, match="loss_mask"):
        evaluate_language_model(model, variables, [], token_num_bytes)
