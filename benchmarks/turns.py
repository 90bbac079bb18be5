"""Processes that take turns on one machine, so that a change of its speed reaches all of them alike.

Each side of a comparison lives in a process of its own, with its own Python and its own threads, and sleeps while the
other works. Only the standard library, so that any Python 3.11 can be a side.
"""

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence


def serve(programs: Mapping[str, Callable[[], object]]) -> None:
    """Runs a side: for each name on standard input, runs that program and answers with its seconds and its result.

    Args:
        programs: by name; each returns when its work is done, and what it returns JSON can hold.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        program = programs[json.loads(line)]
        start = time.perf_counter()
        result = program()
        print(json.dumps([time.perf_counter() - start, result]), file=answers, flush=True)


class Side:
    """A process that runs `serve`."""

    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, program: str) -> float:
        """Seconds that a run of the program took. Raises as `ask` does."""
        return self._answer(program)[0]

    def ask(self, program: str) -> object:
        """What the program returned.

        Raises:
            RuntimeError: the process ended.
        """
        return self._answer(program)[1]

    def _answer(self, program: str) -> tuple[float, object]:
        try:
            self._process.stdin.write(json.dumps(program) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.name}: ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def compare(
    sides: Sequence[Side], program: str, rounds: int, before: str | None = None
) -> dict[str, list[float]]:
    """Seconds of each side for a program in each round, after a round that does not count.

    Args:
        sides: what is compared.
        program: what is timed.
        rounds: how often.
        before: what a side runs at the beginning of each of its turns, untimed, to be as it is in the midst of work.
    """

    def turn(side: Side) -> float:
        if before is not None:
            side.run(before)
        return side.run(program)

    return in_turn({side.name: functools.partial(turn, side) for side in sides}, rounds)


def in_turn(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each returns in each round, all of them in turn, after a round that does not count."""
    found = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            measured = run()
            if number:
                found[name].append(measured)
    return found


def ratio(seconds: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """Median over the rounds of the time of `name` over that of `other`."""
    return statistics.median(x / y for x, y in zip(seconds[name], seconds[other], strict=True))
