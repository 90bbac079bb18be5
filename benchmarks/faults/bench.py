"""What the faults share: a text, folders, and the runs to which nothing is done."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.faults.runs import Start, same_end

_WORDS = 200
_FILES = 40


class Bench:
    """The place where runs are hurt.

    Attributes:
      rng: draws the moments and the victims.
      console: where to say what happens.
    """

    def __init__(self, folder: Path, rng: np.random.Generator, console: Console):
        """Writes a text of random words into `folder`."""
        self.rng, self.console, self._folder = rng, console, folder
        self._numbers = itertools.count()
        self.text = folder / "text"
        self.text.mkdir()
        letters = list("abcdefghij")
        words = ["".join(rng.choice(letters, size=rng.integers(2, 8))) for _ in range(_WORDS)]
        for i in range(_FILES):
            words_of_file = rng.choice(words, size=rng.integers(200, 600))
            (self.text / f"{i}.txt").write_text(" ".join(words_of_file))

    def workdir(self) -> Path:
        """A new one."""
        return self._folder / f"run{next(self._numbers)}"

    def start(self, workdir: Path, *flags: str, **options: Any) -> Start:
        """Starts the run of that workdir, or starts it again."""
        return Start(self.text, workdir, *flags, **options)

    def finish(self, workdir: Path, *flags: str, **options: Any) -> None:
        """Starts it and lets it end."""
        with self.start(workdir, *flags, **options) as start:
            start.finish()

    @functools.cache  # noqa: B019 (there is one bench)
    def undisturbed(self, *flags: str, **options: Any) -> Path:
        """The workdir of a run to which nothing was done."""
        workdir = self.workdir()
        self.finish(workdir, *flags, **options)
        return workdir

    def is_unharmed(self, workdir: Path, **options: Any) -> bool:
        """Lets the run end and compares it with an undisturbed one."""
        self.finish(workdir, **options)
        return same_end(workdir, self.undisturbed(**options))
