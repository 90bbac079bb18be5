"""How many rows and columns of softmax a TPU core holds at a time."""

from pathlib import Path
from typing import NamedTuple

from pallas_kernels.blocks import Shape, Sizes, Table, round_up
from pallas_kernels.dispatch import target

LANES = 128
# What blocks may take, of what the compiler may use; terms of a softmax take up to half as much. A core has 128 MiB.
VMEM_BYTES = 12 * 2**20
VMEM_LIMIT = 32 * 2**20
# Rows of a register of bfloat16, and the most of a block: larger ones hide their transfers no better.
ROWS, MAX_ROWS = 16, 256


class Blocks(NamedTuple):
    """Multiples of 16 and of 128."""

    rows: int
    columns: int


def _flaw(sizes: Sizes, shape: Shape) -> str | None:
    for name, multiple in (("rows", ROWS if shape["passes"] == 2 else LANES), ("columns", LANES)):
        if sizes[name] % multiple:
            return f"{name}={sizes[name]} is no multiple of {multiple}"
        if sizes[name] > max(LANES, shape[f"num_{name}"]):
            return f"{name}={sizes[name]} is more than there are, {shape[f'num_{name}']}"
    return None


# `passes` over the columns: softmax and its gradient take two, the cross-entropy one.
TABLE = Table(
    path=Path(__file__).with_name("blocks.json"),
    lengths=("num_rows", "num_columns"),
    others=("bytes_per_entry", "passes"),
    sizes=Blocks._fields,
    flaw=_flaw,
)


def two_pass_blocks(num_rows: int, num_columns: int, bytes_per_entry: int) -> Blocks:
    """By rule all columns of as many rows as fit into VMEM, else equal parts of the columns of the fewest rows.

    Args:
        num_rows: all rows.
        num_columns: V.
        bytes_per_entry: of all arrays that are cut into blocks together; each block is there twice, as one is
            computed with while the next is on its way.
    """
    entries = VMEM_BYTES // (2 * bytes_per_entry)
    columns = _equal_parts(num_columns, entries // ROWS)
    rows = _equal_parts(num_rows, max(ROWS, min(entries // columns, MAX_ROWS)), ROWS)
    sizes = _choose(rows, columns, num_rows, num_columns, bytes_per_entry, passes=2)
    return Blocks(min(sizes["rows"], round_up(num_rows, ROWS)), sizes["columns"])


def one_pass_blocks(num_rows: int, num_columns: int, bytes_per_entry: int) -> Blocks:
    """By rule many rows, as what is kept of each of them then fills lanes; arguments as of `two_pass_blocks`."""
    rows = min(MAX_ROWS, round_up(num_rows, LANES))
    columns = _equal_parts(num_columns, VMEM_BYTES // (2 * bytes_per_entry * rows))
    sizes = _choose(rows, columns, num_rows, num_columns, bytes_per_entry, passes=1)
    return Blocks(min(sizes["rows"], round_up(num_rows, LANES)), sizes["columns"])


def _choose(rows, columns, num_rows, num_columns, bytes_per_entry, passes) -> Sizes:
    sizes = TABLE.choose(
        target().device_kind,
        {"rows": rows, "columns": columns},
        num_rows=num_rows,
        num_columns=num_columns,
        bytes_per_entry=bytes_per_entry,
        passes=passes,
    )
    return {"rows": sizes["rows"], "columns": _equal_parts(num_columns, sizes["columns"])}


def _equal_parts(length: int, longest: int, unit: int = LANES) -> int:
    """Length of a few equal parts of whole registers that are not longer than `longest`.

    The fewest, but up to twice as many where the length is then a multiple: no part has to be masked.
    """
    units = round_up(length, unit) // unit
    fewest = -(-units // (longest // unit))
    divisors = (parts for parts in range(fewest, 2 * fewest + 1) if units % parts == 0)
    return -(-units // next(divisors, fewest)) * unit
