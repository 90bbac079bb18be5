"""What a claim is: how it is measured, what it is held against, and what came of it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.bench import Bench

# What was measured, as it is stored: `setting` says in words at which size, the rest is up to the claim.
Report = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What came of one expectation.

    Attributes:
      expected: what the paper leads to expect here, and how that is decided.
      reproduced: whether it was so.
      found: the numbers.
    """

    expected: str
    reproduced: bool
    found: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the page; the first column names the row, the others are numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
      title: what is claimed, in a few words.
      paper: arXiv number.
      measure: does what has to be done and returns what was measured, as JSON can hold it.
      verdicts: of what was measured; the first is the headline.
      tables: of what was measured.
      draw: of what was measured, to a PNG.
    """

    title: str
    paper: str
    measure: Callable[[Bench], Report]
    verdicts: Callable[[Report], list[Verdict]]
    tables: Callable[[Report], list[Table]]
    draw: Callable[[Report, Path], None]
