"""What a kernel for an NVIDIA GPU does in its loops, from its machine code as nvdisasm prints it (SASS)."""

import re
from typing import NamedTuple

_LABEL = re.compile(r"\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s)?\s*(\w.*)")
_TARGET = re.compile(r"BRA\b.*`\(\.(L_x_\d+)\)")
# x [64, 16] · y [16, N] of a warpgroup, in bfloat16.
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x16\.")
# Multiply-adds a cycle of the tensor cores of a multiprocessor: 989.4 TFLOP/s of dense bfloat16 over 132 of them at
# 1.83 GHz (NVIDIA H100 datasheet, SXM).
_MULTIPLY_ADDS = 2048


class Loop(NamedTuple):
    """A step of an innermost loop, or all of a kernel that has none.

    Attributes:
        instructions: that a warp issues, but for those which a branch can skip, such as masks and copies.
        tensor_cycles: for which the products of a warpgroup keep the tensor cores busy at their peak.
    """

    instructions: int
    tensor_cycles: int


def loops(listing: str) -> list[Loop]:
    """The innermost loops with products, in their order.

    Where the only products lie outside of loops, all of the kernel; where there are none, the longest innermost loop.
    """
    labels, code = _parse(listing)
    # Behind the exit there are the waits, which are loops, too.
    end = max(i for i, (_, text, _) in enumerate(code) if text.startswith("EXIT"))
    bounds = [
        (labels[target], i)
        for i, (_, _, target) in enumerate(code[:end])
        if target and labels[target] <= i
    ]
    innermost = [
        (first, last)
        for first, last in bounds
        if not any(first <= a and b <= last for a, b in bounds if (a, b) != (first, last))
    ]
    found = [_loop(code, labels, *ends) for ends in innermost]
    if with_products := [x for x in found if x.tensor_cycles]:
        return with_products
    whole = _loop(code, labels, 0, end)
    return [whole] if whole.tensor_cycles else sorted(found)[-1:]


def _parse(listing: str):
    """Index of the instruction behind each label; of each instruction, is it conditional, its text, its target."""
    labels, code = {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.search(line):
            target = _TARGET.match(instruction[2])
            code.append((bool(instruction[1]), instruction[2], target and target[1]))
    return labels, code


def _loop(code, labels, first: int, last: int) -> Loop:
    skipped = set()
    for i in range(first, last):
        is_conditional, _, target = code[i]
        if is_conditional and i < labels.get(target, 0) <= last:
            skipped.update(range(i + 1, labels[target]))
    texts = [code[i][1] for i in range(first, last + 1) if i not in skipped]
    widths = [int(product[1]) for text in texts if (product := _PRODUCT.match(text))]
    return Loop(len(texts), 64 * 16 * sum(widths) // _MULTIPLY_ADDS)
