"""What a model costs: parameters, FLOPs, memory, time and decode state.

FLOPs are counted by the parts themselves (`flops/spent` and `flops/full`, forward, a token), so a
token that is skipped is not paid for; everything else is measured or asked of the compiler.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array

from effjax import pytree
from effjax.models import SequenceModel, state_size


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Counts of scalars; parameters that several layers share count once.

    Attributes:
      total: all parameters.
      embedding: those of the embedding table, a tied head's weights included.
      active: those that one token uses: `total` without the experts that it is not sent to. The
        embedding table counts whole, as a tied head multiplies by all of it.
    """

    total: int
    embedding: int
    active: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of a compiled program on each of its devices, in bytes, as the compiler plans it.

    Attributes:
      arguments: variables and inputs.
      outputs: results.
      temporary: everything between, once buffers are reused.
      peak: what they take together, where outputs take the place of arguments and parts that of one another.
      host: what is in the memory of its host instead, and counted in none of these.
    """

    arguments: int
    outputs: int
    temporary: int
    peak: int
    host: int


@dataclasses.dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass over a batch.

    Attributes:
      median_seconds: median over the runs.
      fastest_seconds: the fastest of them.
      tokens_per_second: tokens of the batch over the median.
      num_runs: runs that were timed.
    """

    median_seconds: float
    fastest_seconds: float
    tokens_per_second: float
    num_runs: int


def count_parameters(params: Any, *, used_experts: float = 1.0) -> Parameters:
    """Counts the parameters of a model.

    Args:
      params: the `params` collection, or the shapes of it.
      used_experts: fraction of the experts of a layer that a token is sent to (`expert_share`).
    """
    total = pytree.count(params)
    idle = (1.0 - used_experts) * pytree.count(params, "experts/.*")
    embedding = pytree.count(params, "embed/embedding")
    return Parameters(total=total, embedding=embedding, active=round(total - idle))


def expert_share(model: nn.Module, mean_experts: float | None = None) -> float:
    """Fraction of the experts of a layer that a token is sent to; 1 for a model without experts.

    Args:
      model: the model.
      mean_experts: true experts that a token got, measured (`moe/mean_experts`); None takes what
        the model spends when its load is even.
    """
    ffn = getattr(model, "ffn", None)
    if ffn is None or not hasattr(ffn, "num_experts"):
        return 1.0
    return (ffn.expected_experts if mean_experts is None else mean_experts) / ffn.num_experts


def measure_memory(compiled: Any) -> Memory | None:
    """Memory of a compiled program; None where the backend does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    # Temporaries of a TPU share places, which their sum does not say; jaxlib 0.12 and newer knows what is allocated.
    # `peak_memory_in_bytes` leaves the temporary part out on some backends.
    sum_of_parts = arguments + outputs + analysis.temp_size_in_bytes - analysis.alias_size_in_bytes
    peak = getattr(analysis, "total_allocation_bytes", sum_of_parts)
    host = (
        analysis.host_argument_size_in_bytes
        + analysis.host_output_size_in_bytes
        + analysis.host_temp_size_in_bytes
        - analysis.host_alias_size_in_bytes
    )
    return Memory(arguments, outputs, analysis.temp_size_in_bytes, peak, host)


def measure_latency(
    compiled: Any, variables: Any, inputs: Mapping[str, Array], num_runs: int = 10
) -> Latency:
    """Times a compiled forward pass, after one run that does not count.

    Raises:
      ValueError: if `num_runs` is less than 1.
    """
    if num_runs < 1:
        raise ValueError(f"num_runs is {num_runs}; valid: 1 or more")
    jax.block_until_ready(compiled(variables, inputs))
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        jax.block_until_ready(compiled(variables, inputs))
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return Latency(median, min(seconds), inputs["tokens"].size / median, num_runs)


def decode_state_bytes(model: SequenceModel, length: int) -> int | None:
    """Bytes of state that the layers keep to decode one sequence, after `length` tokens of it.

    None for models that do not decode.
    """
    if not all(getattr(block.mixer, "causal", True) for block in model.stack().blocks):
        return None
    return state_size(model, length)[-1].bytes
