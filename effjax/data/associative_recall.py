"""Multi-query associative recall: the generated task on which mixers with small states fail first."""

import dataclasses

import numpy as np

from effjax.data.splits import SPLITS, check_split, in_split
from effjax.registry import register


@register("source", "associative_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRecall:
    """Rows of key-value pairs, then queries of the keys, whose targets are the values (MQAR).

        tokens   k1 v1 k2 v2 k3 v3 . . k2 .  . . k3 .  k1 .  . .      (. is filler)
        targets                        v2        v3    v1             (where the loss counts)

    Arora et al., 2023, "Zoology", arXiv 2312.04927, section 3 and appendix. Every query falls on a slot of two tokens
    after the pairs; the slots are drawn without replacement with probability ~ slot^(power_a - 1), so that most
    queries come soon and a few come late, as repetitions in text do. As in the authors' data the answer is not written
    behind its query, or the values still to come could be guessed by elimination (half of four pairs, with no pair
    remembered); so at queries, and only there, the target is not the next token. Filler is drawn from the whole
    vocabulary except the row's keys, so that a key is asked for whenever it is seen again.

    To answer, a mixer has to keep every pair of the row: 2 num_pairs log2(vocab_size / 2) bits at most, which makes
    recall against the size of its state (`effjax.models.state_size`) a curve worth plotting.

    Attributes:
      num_pairs: pairs in a row, all keys and all values different.
      num_queries: keys that are asked for, each once; None asks for all.
      vocab_size: token ids; the lower half are keys, the upper half values. The paper uses 8192; large vocabularies
        separate mixers better.
      power_a: exponent of the law above; 1 is uniform, small values put queries close behind the pairs.
      num_rows: different rows in the training split.
      num_heldout_rows: rows in the held-out split. No table of pairs is in both splits.
      seed: of all rows. Row i of a split depends on the seed and i only.
    """

    num_pairs: int = 8
    num_queries: int | None = None
    vocab_size: int = 256
    power_a: float = 0.01
    num_rows: int = 100_000
    num_heldout_rows: int = 1_000
    seed: int = 0

    def __post_init__(self):
        for field in ("num_pairs", "num_rows", "num_heldout_rows"):
            if getattr(self, field) < 1:
                raise _error(field, getattr(self, field), "1 or more")
        if not 1 <= self.queries <= self.num_pairs:
            raise _error(
                "num_queries", self.num_queries, f"1 to num_pairs={self.num_pairs}, or None"
            )
        if self.vocab_size % 2 or self.vocab_size < 2 * self.num_pairs:
            valid = f"an even number, at least 2 * num_pairs = {2 * self.num_pairs}"
            raise _error("vocab_size", self.vocab_size, valid)
        if not self.power_a > 0:
            raise _error("power_a", self.power_a, "a positive number")
        if self.seed < 0:
            raise _error("seed", self.seed, "0 or more")

    @property
    def queries(self) -> int:
        """Queries in a row."""
        return self.num_pairs if self.num_queries is None else self.num_queries

    def rows(self, split: str, seq_len: int) -> "Rows":
        """The rows of one split, `seq_len` tokens each.

        Raises:
          ValueError: if `seq_len` does not hold the pairs and the queries.
        """
        check_split(split)
        shortest = 2 * (self.num_pairs + self.queries)
        if seq_len < shortest:
            raise _error("seq_len", seq_len, f"at least 2 * (num_pairs + num_queries) = {shortest}")
        return Rows(self, split, seq_len)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Random access to the rows of one split; each is made when it is asked for."""

    task: AssociativeRecall
    split: str
    seq_len: int

    def __len__(self) -> int:
        return self.task.num_rows if self.split == "train" else self.task.num_heldout_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`: tokens, targets, positions, segment_ids int32 [T] and loss_mask float32 [T], 1 at queries."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        task = self.task
        entropy = (task.seed, SPLITS.index(self.split), index)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        keys, values = self._pairs(rng)
        first = 2 * task.num_pairs
        is_key = np.zeros(task.vocab_size, bool)
        is_key[keys] = True
        sequence = rng.choice(np.flatnonzero(~is_key), self.seq_len + 1)
        sequence[:first:2], sequence[1:first:2] = keys, values
        asked = rng.choice(task.num_pairs, task.queries, replace=False)
        at = first + 2 * self._slots(rng, (self.seq_len + 1 - first) // 2)
        sequence[at] = keys[asked]
        tokens, targets = sequence[:-1].astype(np.int32), sequence[1:].astype(np.int32)
        loss_mask = np.zeros(self.seq_len, np.float32)
        targets[at], loss_mask[at] = values[asked], 1
        return {
            "tokens": tokens,
            "targets": targets,
            "positions": np.arange(self.seq_len, dtype=np.int32),
            "segment_ids": np.ones(self.seq_len, np.int32),
            "loss_mask": loss_mask,
        }

    def _pairs(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Different keys and different values, the first drawn table that a hash puts into this split."""
        half = self.task.vocab_size // 2
        while True:
            keys, values = (rng.choice(half, self.task.num_pairs, replace=False) for _ in range(2))
            if in_split(np.stack([keys, values]).astype("<i8").tobytes(), self.split, 0.5):
                return keys, half + values

    def _slots(self, rng: np.random.Generator, num_slots: int) -> np.ndarray:
        weights = np.arange(1, num_slots + 1) ** (self.task.power_a - 1.0)
        weights /= weights.sum()
        return rng.choice(num_slots, self.task.queries, replace=False, p=weights)


def _error(field: str, value: object, valid: str) -> ValueError:
    return ValueError(f"source 'associative_recall': {field} is {value!r}; valid: {valid}")
