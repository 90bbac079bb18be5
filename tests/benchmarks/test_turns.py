import sys

import pytest

from benchmarks import turns

SLEEPER = """
import sys, time
from benchmarks.turns import serve
serve({"sleep": lambda: time.sleep(0.05), "print": lambda: print("hello"), "sum": lambda: [1 + 1], "exit": sys.exit})
"""


@pytest.fixture
def side():
    side = turns.Side("sleeper", [sys.executable, "-c", SLEEPER])
    yield side
    side.close()


def test_a_side_times_its_programs_in_its_own_process(side):
    assert side.run("sleep") >= 0.05
    assert side.run("print") > 0  # what it prints is no answer
    assert side.ask("sum") == [2]


def test_a_side_that_ended_is_named(side):
    with pytest.raises(RuntimeError, match="sleeper: ended with exit code 0"):
        side.run("exit")


def test_sides_take_turns_and_the_first_round_does_not_count():
    order = []

    class Scripted:
        def __init__(self, name, seconds):
            self.name, self._seconds = name, iter(seconds)

        def run(self, program):
            order.append(self.name)
            return next(self._seconds)

    sides = [Scripted("a", [99.0, 1.0, 2.0, 6.0]), Scripted("b", [0.1, 1.0, 1.0, 2.0])]
    seconds = turns.compare(sides, "any", rounds=3)
    assert order == ["a", "b"] * 4
    assert seconds == {"a": [1.0, 2.0, 6.0], "b": [1.0, 1.0, 2.0]}
    assert turns.ratio(seconds, "a", "b") == 2.0
