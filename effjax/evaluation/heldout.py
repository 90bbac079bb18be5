"""How well a language model predicts text that it was not trained on.

The loss is -log p(target) in nats, summed over every target that `loss_mask` keeps, those that end
a document included; batches are never averaged, so their size does not matter. Bits per byte makes
models with different tokenizers comparable (Gao et al., 2020, arXiv 2101.00027, section 3.1):

    bits per byte = (summed loss / ln 2) / bytes of text that the targets stand for

Special tokens stand for no bytes, so a model pays for ending a document and gets nothing for it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

LN2 = float(np.log(2.0))


@flax.struct.dataclass
class BatchSums:
    """What one batch adds to the totals; T is the length of its rows.

    Attributes:
      loss: [T] summed loss in nats of the targets by the position of their input token within its
        document.
      tokens: [T] number of those targets.
      bytes: [T] bytes of text that they stand for.
      inputs: number of input tokens that are not padding; the weight of the metrics.
      metrics: scalar metrics of the model for this batch.
    """

    loss: Float[Array, " T"]
    tokens: Float[Array, " T"]
    bytes: Float[Array, " T"]
    inputs: Float[Array, ""]
    metrics: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Totals over held-out text.

    Attributes:
      loss_sums: float64 [T] summed loss in nats by position in context: entry p is about the
        targets that the model predicts from p + 1 tokens.
      token_counts: float64 [T] targets at each position.
      byte_counts: float64 [T] bytes that those targets stand for.
      metrics: averages over input tokens of the scalar metrics that the model reports
        (`flops/spent`, `depth/...`).
    """

    loss_sums: np.ndarray
    token_counts: np.ndarray
    byte_counts: np.ndarray
    metrics: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss in nats a token."""
        return float(self.loss_sums.sum() / self.token_counts.sum())

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that a byte of the text takes; None if the targets stand for no bytes."""
        num_bytes = self.byte_counts.sum()
        return float(self.loss_sums.sum() / LN2 / num_bytes) if num_bytes else None

    def by_position(self, num_bins: int | None = None) -> dict[str, np.ndarray]:
        """Loss and bits per byte by position in context.

        Args:
          num_bins: bins whose edges grow geometrically from single positions; None keeps every
            position apart.

        Returns:
          `start` and `stop` (positions of each bin, stop exclusive), `loss` (nats a token),
          `bits_per_byte` and `tokens`, each [bins]. Bins without targets are left out;
          `bits_per_byte` is NaN where the targets stand for no bytes.
        """
        length = len(self.loss_sums)
        edges = np.arange(length + 1) if num_bins is None else geometric_edges(length, num_bins)
        loss, tokens, num_bytes = (
            np.add.reduceat(sums, edges[:-1])
            for sums in (self.loss_sums, self.token_counts, self.byte_counts)
        )
        kept = tokens > 0
        with np.errstate(divide="ignore", invalid="ignore"):
            bits = np.where(num_bytes > 0, loss / LN2 / num_bytes, np.nan)
            mean = loss / tokens
        table = {
            "start": edges[:-1],
            "stop": edges[1:],
            "loss": mean,
            "bits_per_byte": bits,
            "tokens": tokens,
        }
        return {name: column[kept] for name, column in table.items()}


def evaluate_language_model(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Mapping[str, Array]],
    token_num_bytes: np.ndarray,
    *,
    output_sharding: jax.sharding.Sharding | None = None,
) -> HeldOut:
    """Held-out loss of a model over all of `batches`.

    Args:
      model: a language model (`apply` returns logits).
      variables: its variables; sharded arrays are used where they are.
      batches: batches for language models, on the host or already sharded over a mesh. Rows of
        padding change nothing.
      token_num_bytes: int32 [V], bytes of text that each token stands for
        (`tokenizer.token_num_bytes`).
      output_sharding: where the sums go; on several hosts, a sharding replicated over the mesh.

    Raises:
      ValueError: if no batch has a target.
    """
    step = make_eval_step(model, output_sharding)
    sizes = jnp.asarray(token_num_bytes, jnp.int32)
    totals = _Totals()
    pending = None
    for batch in batches:
        dispatched = step(variables, dict(batch), sizes)
        # Fetching one batch behind leaves the device something to do meanwhile.
        if pending is not None:
            totals.add(pending)
        pending = dispatched
    if pending is not None:
        totals.add(pending)
    return totals.result()


@functools.lru_cache(maxsize=8)
def make_eval_step(
    model: nn.Module, output_sharding: jax.sharding.Sharding | None = None
) -> Callable[..., BatchSums]:
    """The jitted step `(variables, batch, token_num_bytes) -> BatchSums` of a model.

    Kept for each model, so that evaluating often in the course of training compiles once.
    """

    def step(variables, batch, token_num_bytes):
        output: Any = model.apply(
            variables,
            batch["tokens"],
            positions=batch["positions"],
            segment_ids=batch["segment_ids"],
        )
        loss = token_losses(output.logits, batch["targets"], batch["loss_mask"])
        mask = batch["loss_mask"]
        sums = functools.partial(_sum_by_position, positions=batch["positions"])
        reported = output.aux | output.metrics
        return BatchSums(
            loss=sums(loss),
            tokens=sums(mask),
            bytes=sums(mask * token_num_bytes[batch["targets"]]),
            inputs=jnp.sum(batch["segment_ids"] > 0, dtype=jnp.float32),
            metrics={name: jnp.float32(x) for name, x in reported.items() if jnp.ndim(x) == 0},
        )

    return jax.jit(step, out_shardings=output_sharding)


def token_losses(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"], loss_mask: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """-log p(target) in nats where the mask is on, 0 elsewhere, whatever the logits are there."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.where(loss_mask > 0, losses * loss_mask, 0.0)


def geometric_edges(length: int, num_bins: int) -> np.ndarray:
    """Edges from 0 to `length` of at most `num_bins` bins, none empty, each wider than the last."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; valid: at least 1")
    edges = np.geomspace(1, length + 1, num_bins + 1) - 1
    return np.unique(np.rint(edges).astype(int))


def _sum_by_position(
    values: Float[Array, "B T"], positions: Int[Array, "B T"]
) -> Float[Array, " T"]:
    values = values.astype(jnp.float32)
    return jax.ops.segment_sum(values.ravel(), positions.ravel(), num_segments=values.shape[1])


class _Totals:
    """Float64 sums on the host: float32 would lose the small batches of a long evaluation."""

    def __init__(self):
        self._sums = np.zeros((3, 0))
        self._metrics: dict[str, float] = {}
        self._inputs = 0.0

    def add(self, batch: BatchSums) -> None:
        batch = jax.device_get(batch)
        sums = np.stack([batch.loss, batch.tokens, batch.bytes]).astype(np.float64)
        length = max(sums.shape[1], self._sums.shape[1])
        self._sums = _lengthen(self._sums, length) + _lengthen(sums, length)
        inputs = float(batch.inputs)
        if inputs:
            self._inputs += inputs
            for name, value in batch.metrics.items():
                self._metrics[name] = self._metrics.get(name, 0.0) + inputs * float(value)

    def result(self) -> HeldOut:
        if not self._sums[1].sum():
            raise ValueError("batches have no target with loss_mask > 0; valid: one or more")
        metrics = {name: value / self._inputs for name, value in self._metrics.items()}
        loss, tokens, num_bytes = self._sums
        return HeldOut(loss, tokens, num_bytes, metrics)


def _lengthen(sums: np.ndarray, length: int) -> np.ndarray:
    return np.pad(sums, ((0, 0), (0, length - sums.shape[1])))
