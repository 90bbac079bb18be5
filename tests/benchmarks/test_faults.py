"""What the fault benchmark makes of runs; that the faults are survived is its own, long, work."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks.faults import outcome, runs
from benchmarks.faults.bench import Bench
from benchmarks.faults.catalogue import FAULTS
from benchmarks.faults.outcome import Outcome
from effjax.checkpoint import Checkpoints
from effjax.data import build
from effjax.training.state import TrainState


def write_run(workdir, params, batches=1):
    """What a run leaves that ends after step 2 with these parameters."""
    data = {"source": {"name": "associative_recall"}, "seq_len": 64, "batch_size": 2}
    iterator = build(data, split="train")
    for _ in range(batches):
        next(iterator)
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(jnp.int32(2), params, {"moment": params}, params, jnp.uint32([1, 2]))
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state, iterator, {})
    iterator.close()
    lines = [{"step": 2, "loss": 1.5, "tokens_per_second": float(np.random.default_rng().random())}]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def test_two_ends_are_the_same_to_the_bit_or_not(tmp_path, rng):
    kernel = rng.standard_normal((3, 4)).astype(np.float32)
    one = write_run(tmp_path / "one", {"kernel": kernel})
    assert runs.same_end(one, write_run(tmp_path / "same", {"kernel": kernel}))
    flipped = kernel.copy()
    flipped.view(np.uint32)[1, 2] ^= 1
    assert not runs.same_end(one, write_run(tmp_path / "flipped", {"kernel": flipped}))
    later = write_run(tmp_path / "later", {"kernel": kernel}, batches=2)
    assert not runs.same_end(one, later)
    assert runs.checkpoints(one) == [2]
    assert runs.last_step(one) == 2
    np.testing.assert_array_equal(runs.arrays(one)["params['kernel']"], kernel)


def test_the_document_has_a_row_a_fault():
    killed = Outcome("SIGKILL", "in mid-save", notes=["a note"])
    killed.add(True, 3)
    killed.add(False)
    part = {"seed": 17, "jax": "0.1", "outcomes": [dataclasses.asdict(killed)]}
    *_, row = outcome.document({"killed": part}).splitlines()
    assert row == f"| SIGKILL | in mid-save | 4 | 3 | {outcome.BITWISE}; a note | 17 |"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_survived(tmp_path, rng, name):
    tries = 3 if name == "killed" else 1
    outcomes = FAULTS[name](Bench(tmp_path, rng, Console()), tries)
    assert [one for one in outcomes if one.survived < one.tried] == []
