"""Every claim, by the id of its paper."""

from benchmarks.claims import (
    adamoe,
    attention_io,
    based,
    flash_attention,
    matryoshka,
    mor,
    switch,
    two_pass_softmax,
)
from benchmarks.claims.claim import Claim

CLAIMS: dict[str, Claim] = {
    "mor": mor.CLAIM,
    "switch": switch.CLAIM,
    "adamoe": adamoe.CLAIM,
    "based": based.CLAIM,
    "matryoshka": matryoshka.CLAIM,
    "attention-io-complexity": attention_io.CLAIM,
    "flash-attention-2": flash_attention.CLAIM,
    "two-pass-softmax": two_pass_softmax.CLAIM,
}
