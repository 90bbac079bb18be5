"""How much of linear attention a TPU core takes at a time."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.blocks import Shape, Sizes, Table, round_up
from pallas_kernels.chips import matrix_width, num_cores

LANES = 128
# What the blocks may take, of what the compiler may use with what it keeps beside; a core has 128 MiB, one of v4 16.
VMEM_BYTES, V4_VMEM_BYTES = 20 * 2**20, 12 * 2**20
VMEM_LIMIT = 32 * 2**20
# Of all sequences of a grid step: they fill each other's waits.
MAX_HEADS = 8
MAX_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes.

    Attributes:
        chunk: tokens whose weights are computed at once.
        tokens: tokens a grid step, whole chunks.
        heads: heads a grid step, a divisor of all heads.
        sequences: sequences a grid step, a divisor of the batch.
    """

    chunk: int
    tokens: int
    heads: int
    sequences: int

    def turns(self, dim: int) -> bool:
        """Whether the kernels take [tokens, channels], `dim` a head, as the model has them, and turn them.

        Where the channels of a grid step are whole registers. Fewer XLA itself lays out turned, where it can choose.
        """
        return self.heads * dim % LANES == 0


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    if sizes["chunk"] % LANES:
        return f"chunk={sizes['chunk']} is no multiple of {LANES}"
    if sizes["tokens"] % sizes["chunk"]:
        return f"tokens={sizes['tokens']} is no multiple of chunk={sizes['chunk']}"
    if sizes["tokens"] > max(LANES, shape["time"]):
        return f"tokens={sizes['tokens']} is more than there are, {shape['time']}"
    if shape["heads"] % sizes["heads"]:
        return f"heads={sizes['heads']} does not divide the heads, {shape['heads']}"
    return None


TABLE = Table(
    path=Path(__file__).with_name("blocks.json"),
    lengths=("time",),
    others=("heads", "dim", "value_dim", "num_features", "dtype"),
    sizes=("chunk", "tokens", "heads"),
    flaw=_flaw,
)


def ones_rows(dtype) -> int:
    """Rows of a register: what a row of ones below the values costs."""
    return 32 // jnp.dtype(dtype).itemsize


def blocks(
    *,
    batch: int,
    time: int,
    heads: int,
    dim: int,
    value_dim: int,
    num_features: int,
    dtype,
    device_kind: str,
    chunk_size: int | None = None,
) -> Blocks | None:
    """The blocks of `TABLE`, or else the largest that fit into VMEM; None where the smallest does not.

    Args:
        batch: sequences.
        time: tokens.
        heads: all heads.
        dim: D of the kernel.
        value_dim: E of the kernel, without the row of ones.
        num_features: F of the kernel.
        dtype: of q, k and v.
        device_kind: a chunk is as long as the matrix unit of the chip is wide.
        chunk_size: tokens a chunk, rounded up to whole registers; None: by table or device, less where that cannot fit.
    """
    shape = {
        "heads": heads,
        "dim": dim,
        "value_dim": value_dim,
        "num_features": num_features,
        "dtype": jnp.dtype(dtype).name,
    }
    by_rule = _by_rule(time=time, device_kind=device_kind, chunk_size=chunk_size, **shape)
    if by_rule is None:
        return None
    if chunk_size is None:
        sizes = TABLE.choose(device_kind, by_rule, time=time, **shape)
        # Of a bucket of lengths the table has the sizes of the longest.
        whole = round_up(time, LANES)
        chunk = min(sizes["chunk"], whole)
        tokens = chunk * max(1, min(sizes["tokens"], whole) // chunk)
        by_rule = {"chunk": chunk, "tokens": tokens, "heads": sizes["heads"]}
    return Blocks(**by_rule, sequences=_sequences(batch, by_rule, shape, device_kind))


def _sequences(batch: int, sizes: Sizes, shape: Shape, device_kind: str) -> int:
    """As many as fill up the heads of a grid step and fit into VMEM, and leave each core as much to do."""
    cores, heads = num_cores(device_kind), sizes["heads"]
    of_core = 1 if batch % cores else batch // cores
    for count in range(max(1, MAX_HEADS // heads), 1, -1):
        size = _vmem_bytes(**shape | sizes | {"heads": count * heads})
        if of_core % count == 0 and size <= _budget(device_kind):
            return count
    return 1


def _by_rule(
    *, time, heads, dim, value_dim, num_features, dtype, device_kind, chunk_size
) -> Sizes | None:
    whole = round_up(time, LANES)
    if chunk_size is not None:
        chunks = (round_up(chunk_size, LANES),)
    else:
        chunks = tuple(range(matrix_width(device_kind), 0, -LANES))
    for chunk in (min(chunk, whole) for chunk in chunks):
        for count in range(min(MAX_HEADS, heads), 0, -1):
            if heads % count:
                continue
            tokens = chunk * max(1, min(MAX_TOKENS, whole) // chunk)
            while tokens >= chunk:
                size = _vmem_bytes(chunk, tokens, count, dim, value_dim, num_features, dtype)
                if size <= _budget(device_kind):
                    return {"chunk": chunk, "tokens": tokens, "heads": count}
                tokens = tokens // 2 // chunk * chunk
    return None


def _budget(device_kind: str) -> int:
    return V4_VMEM_BYTES if device_kind == "TPU v4" else VMEM_BYTES


def _vmem_bytes(chunk, tokens, heads, dim, value_dim, num_features, dtype) -> int:
    """Of the backward, which needs most: blocks are double-buffered."""
    size = jnp.dtype(dtype).itemsize
    streamed = 2 * heads * tokens * ((4 * dim + 4 * value_dim) * size + 32)
    width = value_dim + ones_rows(dtype)
    states = 5 * heads * num_features * round_up(width, LANES) * 4
    states += 2 * heads * (tokens // chunk) * width * round_up(num_features, LANES) * size
    temporaries = 4 * chunk * (4 * num_features + 5 * chunk + 4 * width)
    return streamed + states + temporaries
