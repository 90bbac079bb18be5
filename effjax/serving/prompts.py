"""Token ids that come from outside: checked, and padded so that few programs serve every length."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Int

# Token ids of a text, as callers have them.
TokenIds = Int[Array | np.ndarray, " n"] | Sequence[int]

_SMALLEST = 16


def bucket(length: int) -> int:
    """The length that an array is padded to: the next power of two, at least 16."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def check_prompt(field: str, prompt: Any, vocab_size: int) -> Int[np.ndarray, " n"]:
    """The token ids of a text.

    Raises:
      ValueError: naming `field`, for no ids, an array of another rank or type, or ids that are not in the vocabulary.
    """
    prompt = np.asarray(prompt)
    if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
        raise ValueError(
            f"{field} is {prompt.dtype}{list(prompt.shape)}; valid: one or more token ids, int [n]"
        )
    return check_ids(field, prompt, vocab_size)


def check_ids(field: str, ids: Int[np.ndarray, " n"], vocab_size: int) -> Int[np.ndarray, " n"]:
    """Ids as int32.

    Raises:
      ValueError: naming `field`, for one that is not in the vocabulary.
    """
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise ValueError(f"{field} has the id {wrong[0]}; valid: 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def pad(
    prompts: Sequence[Int[np.ndarray, " n"]], max_length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Texts as one array, padding (0) behind them, and the length of each.

    Args:
      prompts: token ids of each, at most `max_length`.
      max_length: T is the bucket of the longest text, but not more than this.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(bucket(int(lengths.max())), max_length)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
