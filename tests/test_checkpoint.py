"""Checkpoints come back as they were saved, or not at all."""

import logging
import resource
import shutil
import time
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import checkpoint
from effjax.checkpoint import CheckpointError, Checkpoints


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any
    ema: Any
    rng: Any


def make_state(rng, step, *, ema=True):
    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {
        "dense": {"kernel": array(4, 6), "bias": array(6)},
        "embed": {"embedding": array(8, 4)},
    }
    masked = optax.partition(
        {"a": optax.adamw(1e-3), "b": optax.sgd(0.1)},
        {"dense": {"kernel": "a", "bias": "b"}, "embed": {"embedding": "a"}},
    )
    return State(
        step=jnp.int32(step),
        params=params,
        opt_state=masked.init(params),
        ema=jax.tree.map(lambda x: 2 * x, params) if ema else None,
        rng=jax.random.key_data(jax.random.key(step)),
    )


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def numbers(position=0):
    iterator = iter(grain.MapDataset.range(1000).to_iter_dataset())
    for _ in range(position):
        next(iterator)
    return iterator


def save(workdir, states, losses=None, **options):
    losses = losses or [None] * len(states)
    with Checkpoints(workdir, **options) as checkpoints:
        for state, loss in zip(states, losses, strict=True):
            progress = {"seen": int(state.step)}
            checkpoints.save(state, numbers(int(state.step)), progress, heldout_loss=loss)
    return checkpoints.steps()


def assert_same(restored, expected):
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ema", [True, False])
def test_state_iterator_and_progress_come_back(tmp_path, rng, ema):
    state = make_state(rng, 7, ema=ema)
    save(tmp_path, [state])
    iterator = numbers()
    restored, progress = Checkpoints(tmp_path).restore(abstract(state), iterator)
    assert_same(restored, state)
    assert next(iterator) == 7
    assert progress == {"seen": 7}


def test_nothing_saved_restores_nothing(tmp_path, rng):
    assert Checkpoints(tmp_path).restore(abstract(make_state(rng, 0)), numbers()) is None


def test_buffers_may_be_donated_while_the_save_is_in_flight(tmp_path, rng):
    """What is written is the state at the time of the call, not what has been computed in its buffers since."""
    expected = rng.standard_normal((512, 512)).astype(np.float32)
    state = make_state(rng, 1).replace(params={"kernel": jnp.array(expected)}, ema=None)
    update = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    like = abstract(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, numbers(), {})
        for _ in range(20):
            state = update(state)
        jax.block_until_ready(state)
    restored, _ = Checkpoints(tmp_path).restore(like, numbers())
    np.testing.assert_array_equal(restored.params["kernel"], expected)


def test_restores_onto_another_mesh(tmp_path, rng):
    state = make_state(rng, 3)
    save(tmp_path, [state])
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    restored, _ = Checkpoints(tmp_path).restore(abstract(state, sharding), numbers())
    assert_same(restored, state)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(restored))


def test_the_newest_and_the_best_are_kept(tmp_path, rng):
    states = [make_state(rng, step) for step in (1, 2, 3, 4, 5)]
    assert save(tmp_path / "best", states, [3.0, 1.0, 2.0, None, 4.0], keep=2, keep_best=True) == [
        2,
        4,
        5,
    ]
    assert save(tmp_path / "newest", states, [3.0, 1.0, 2.0, None, 4.0], keep=2) == [4, 5]


def test_the_best_is_known_to_the_next_start(tmp_path, rng):
    save(tmp_path, [make_state(rng, 1), make_state(rng, 2)], [1.0, 2.0], keep=1, keep_best=True)
    later = [make_state(rng, 3), make_state(rng, 4)]
    assert save(tmp_path, later, [3.0, None], keep=1, keep_best=True) == [1, 4]


def damage_by_truncating(path):
    for file in (path / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def array_file(path):
    return max((path / "params").rglob("d/*"), key=lambda file: file.stat().st_size)


def damage_by_losing_a_file(path):
    array_file(path).unlink()


def damage_by_flipping_a_bit(path):
    largest = array_file(path)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def damage_by_losing_an_item(path):
    shutil.rmtree(path / "data")


def damage_by_emptying_progress(path):
    (path / "progress" / "metadata").write_text("")


DAMAGES = [
    damage_by_truncating,
    damage_by_losing_a_file,
    damage_by_flipping_a_bit,
    damage_by_losing_an_item,
    damage_by_emptying_progress,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, rng, caplog, damage):
    states = [make_state(rng, 1), make_state(rng, 2)]
    save(tmp_path, states, [1.0, 0.5])
    damaged = tmp_path / "checkpoints" / "2"
    damage(damaged)
    iterator = numbers()
    with Checkpoints(tmp_path, keep_best=True) as checkpoints, caplog.at_level(logging.WARNING):
        restored, _ = checkpoints.restore(abstract(states[0]), iterator)
        assert_same(restored, states[0])
        assert next(iterator) == 1
        assert f"checkpoint {damaged} cannot be read" in caplog.text
        # The run comes past that step again and must be able to save there.
        checkpoints.save(states[1], numbers(), {})
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(states[1]), numbers())[0], states[1])
    assert [path.name for path in (tmp_path / "damaged_checkpoints").iterdir()] == ["2.0"]


def test_all_damaged_is_an_error_that_names_them_and_moves_nothing(tmp_path, rng):
    states = [make_state(rng, 1), make_state(rng, 2)]
    save(tmp_path, states)
    for step in (1, 2):
        damage_by_truncating(tmp_path / "checkpoints" / str(step))
    with pytest.raises(CheckpointError) as raised:
        Checkpoints(tmp_path).restore(abstract(states[0]), numbers())
    assert str(tmp_path / "checkpoints" / "1") in str(raised.value)
    assert str(tmp_path / "checkpoints" / "2") in str(raised.value)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_what_a_kill_leaves_behind_is_no_checkpoint(tmp_path, rng):
    state = make_state(rng, 1)
    save(tmp_path, [state])
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", unfinished)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]
        assert_same(checkpoints.restore(abstract(state), numbers())[0], state)
        checkpoints.save(make_state(rng, 2), numbers(), {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert not unfinished.exists()


def wait_until_quiet(folder):
    """Returns when nothing has been written for a while."""
    before = None
    while before != (now := sorted(folder.rglob("*"))):
        before = now
        time.sleep(0.5)


def test_a_disk_that_is_full_is_one_error_and_costs_no_other_checkpoint(tmp_path, rng):
    kernel = jnp.asarray(rng.standard_normal((256, 256)), jnp.float32)
    states = [make_state(rng, step).replace(params={"kernel": kernel}) for step in (1, 2)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(states[0], numbers(1), {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (kernel.nbytes // 4, hard))
        try:
            checkpoints.save(states[1], numbers(2), {})
            with pytest.raises(CheckpointError, match=r"complete: 1\).*File too large"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    wait_until_quiet(tmp_path)  # the other arrays may still be on their way
    assert save(tmp_path, states[1:]) == [1, 2]
    assert_same(Checkpoints(tmp_path).restore(abstract(states[1]), numbers())[0], states[1])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_not_written(tmp_path, rng, value):
    state = make_state(rng, 1)
    poisoned = state.params["dense"]["kernel"].at[2, 3].set(value)
    state = state.replace(params=state.params | {"dense": {"kernel": poisoned}})
    with pytest.raises(FloatingPointError, match="'kernel'"):
        save(tmp_path, [state])
    assert Checkpoints(tmp_path).steps() == []


def test_digest_sees_every_bit(rng):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8, jnp.bool_):
        array = jnp.asarray(rng.integers(0, 2, 40), dtype)
        i = int(rng.integers(40))
        other = array.at[i].set(
            ~array[i] if dtype == jnp.bool_ else array[i] + jnp.asarray(1, dtype)
        )
        assert checkpoint.digest({"a": array}) == checkpoint.digest({"a": jnp.array(array)})
        assert checkpoint.digest({"a": array}) != checkpoint.digest({"a": other})


@pytest.mark.parametrize("ema", [True, False])
def test_restore_variables_prefers_the_average(tmp_path, rng, ema):
    states = [make_state(rng, step, ema=ema) for step in (4, 9)]
    save(tmp_path, states)
    for state, asked in ((states[1], None), (states[0], 4)):
        variables, step = checkpoint.restore_variables(tmp_path, asked)
        assert step == int(state.step)
        assert_same(variables, {"params": state.ema if ema else state.params})


def test_restore_variables_of_a_missing_step_says_which_there_are(tmp_path, rng):
    with pytest.raises(CheckpointError, match="has none"):
        checkpoint.restore_variables(tmp_path)
    save(tmp_path, [make_state(rng, 4), make_state(rng, 9)])
    with pytest.raises(CheckpointError, match=r"step 5 was asked for.*has the steps 4, 9"):
        checkpoint.restore_variables(tmp_path, 5)


def test_restore_variables_of_a_damaged_step(tmp_path, rng):
    states = [make_state(rng, 4), make_state(rng, 9)]
    save(tmp_path, states)
    shutil.rmtree(tmp_path / "checkpoints" / "9" / "ema")
    variables, step = checkpoint.restore_variables(tmp_path)
    assert step == 4
    assert_same(variables["params"], states[0].ema)
    with pytest.raises(CheckpointError, match="9"):
        checkpoint.restore_variables(tmp_path, 9)
