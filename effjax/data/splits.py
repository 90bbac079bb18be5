"""Splits by a stable hash: every machine and every run holds out the same documents."""

import hashlib

import numpy as np

SPLITS = ("train", "heldout")


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; valid: {', '.join(map(repr, SPLITS))}")


def check_fraction(where: str, fraction: float) -> None:
    """Raises ValueError unless `fraction` is in [0, 1); `where` names the part it belongs to."""
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"{where}: heldout_fraction is {fraction!r}; valid: 0 <= fraction < 1")


def in_split(key: str | bytes, split: str, heldout_fraction: float) -> bool:
    """Whether the document with this key belongs to `split`.

    The key is hashed to a uniform number in [0, 1); the document is held out when that number is
    below `heldout_fraction`. Adding documents therefore never moves another one to the other side.
    """
    check_split(split)
    heldout = _hash64(key) < heldout_fraction * 2.0**64
    return heldout == (split == "heldout")


def split_mask(key: str, count: int, split: str, heldout_fraction: float) -> np.ndarray:
    """Which of the `count` documents in the file named `key` belong to `split`.

    The same rule as `in_split` with one hash a document, but fast enough for millions of documents:
    the hashes are the raw output of PCG64 seeded by the key, which NumPy keeps stable between
    versions.

    Returns:
      bool [count].
    """
    check_split(split)
    hashes = np.random.PCG64(_hash64(key)).random_raw(count)
    heldout = hashes < heldout_fraction * 2.0**64
    return heldout == (split == "heldout")


def _hash64(key: str | bytes) -> int:
    data = key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
