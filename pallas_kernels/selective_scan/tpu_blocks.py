"""How much of the selective scan a TPU core takes at a time."""

from pathlib import Path

from pallas_kernels.blocks import Shape, Sizes, Table

LANES = 128
# The more channels, the more share the columns of B and C; of 1024 the code is long enough.
MOST_CHANNELS = 1024
# Channels x states of a block.
MOST_STATES = 2**15
# Of a chunk of u.
MOST_BYTES = 3 * 2**19
# Bytes of states, as if they were of the dtype of u, that a trip of the forward may go through.
MOST_UNROLLED = 3 * 2**17


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    if sizes["channels"] % LANES or shape["channels"] % sizes["channels"]:
        return (
            f"channels={sizes['channels']} is no multiple of {LANES} that divides the channels, "
            f"{shape['channels']}"
        )
    return None


TABLE = Table(
    path=Path(__file__).with_name("blocks.json"),
    lengths=("time",),
    others=("channels", "states", "dtype"),
    sizes=("channels",),
    flaw=_flaw,
)


def chunk_tokens(*, time: int, channels: int, itemsize: int) -> int:
    """Tokens a chunk: the more, the more share what a grid step begins with.

    Args:
        time: T, filled up to a multiple of 128.
        channels: of a block.
        itemsize: bytes of an element of u.
    """
    most = MOST_BYTES // (channels * itemsize)
    sizes = (8 * LANES, 4 * LANES, 2 * LANES, LANES)
    return next((size for size in sizes if size <= most and time % size == 0), LANES)


def unrolled_steps(count: int, *, least: int, block_states: int, itemsize: int) -> int:
    """Steps in a trip of a loop: the more, the fewer ends there are at which products are waited for, and the longer is
    the code, which has `block_states` to do a step, and in float32 several passes of the matrix units.

    Args:
        count: steps of a chunk, a multiple of `least`.
        least: a power of two.
        block_states: channels x states of a block.
        itemsize: bytes of an element of u.
    """
    steps = least
    while 2 * steps * block_states * itemsize <= MOST_UNROLLED and count % (2 * steps) == 0:
        steps *= 2
    return steps


def block_channels(device_kind: str, *, time: int, channels: int, states: int, dtype: str) -> int:
    """Channels a block.

    Args:
        device_kind: as `jax.Device.device_kind` says.
        time: T.
        channels: E, filled up to a multiple of 128.
        states: N, filled up to a multiple of 8.
        dtype: of u.
    """
    most = min(channels, MOST_CHANNELS, MOST_STATES // states)
    by_rule = max(size for size in range(LANES, most + 1, LANES) if channels % size == 0)
    shape = {"time": time, "channels": channels, "states": states, "dtype": dtype}
    return TABLE.choose(device_kind, {"channels": by_rule}, **shape)["channels"]
