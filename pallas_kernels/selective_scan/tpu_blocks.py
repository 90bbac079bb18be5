"""How much of the selective scan a TPU core takes at a time."""

from pathlib import Path

from pallas_kernels.blocks import Shape, Sizes, Table

LANES = 128
# The more channels, the more share the columns of B and C; of 1024 the code is long enough.
MOST_CHANNELS = 1024
# Channels x states of a block in a chunk of 128 tokens: the backward has all of these states in VMEM.
MOST_STATES = 2**15


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


def chunk_tokens(*, time: int, block_states: int, dtype: str) -> int:
    """Tokens a chunk: of two registers, where there is room, these share what a grid step begins with.

    Args:
        time: T, filled up to a multiple of 128.
        block_states: channels x states of a block.
        dtype: of u.
    """
    fits = dtype == "bfloat16" and 2 * block_states <= MOST_STATES
    return 2 * LANES if fits and time % (2 * LANES) == 0 else LANES


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
