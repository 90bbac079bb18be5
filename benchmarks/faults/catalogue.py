"""Every fault that is tried, by name."""

from collections.abc import Callable

from benchmarks.faults import ends, inputs, storage
from benchmarks.faults.bench import Bench
from benchmarks.faults.outcome import Outcome

# Each is called with the bench and how often to try, and says what came of it.
FAULTS: dict[str, Callable[[Bench, int], list[Outcome]]] = {
    "killed": ends.killed,
    "killed_among_two": ends.killed_among_two,
    "told_to_stop": ends.told_to_stop,
    "full_disk": storage.full_disk,
    "damaged": storage.damaged,
    "bad_sources": inputs.bad_sources,
    "not_finite": inputs.not_finite,
    "other_meshes": inputs.other_meshes,
}
