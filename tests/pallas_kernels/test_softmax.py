"""softmax, cross_entropy and linear_cross_entropy: against JAX's and optax's own, and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from proof import CHIPS, assert_close, needs_libtpu, relative_error, temporary_bytes

from pallas_kernels import cross_entropy, linear_cross_entropy, softmax, topology
from pallas_kernels.softmax import tpu, tpu_blocks, xla

FAST = ["xla", "tpu_interpret"]
ALL = ["reference", *FAST]


@pytest.fixture
def small_blocks(monkeypatch):
    """So that short rows are several blocks, the last one not whole."""
    monkeypatch.setattr(xla, "BLOCK", 128)
    monkeypatch.setattr(tpu_blocks, "VMEM_BYTES", 2**16)
    monkeypatch.setattr(tpu_blocks, "MAX_ROWS", 32)


@pytest.fixture
def small_groups(monkeypatch):
    """So that short rows, each one block, are several groups, the last one not whole."""
    monkeypatch.setattr(tpu, "GROUP", 256)
    monkeypatch.setattr(tpu, "LOSS_GROUP", 256)


def test_small_blocks_are_several(small_blocks):
    assert tpu_blocks.two_pass_blocks(42, 700, 8) == (16, 256)
    assert tpu_blocks.one_pass_blocks(42, 700, 4) == (32, 256)
    assert tpu_blocks.one_pass_blocks(42, 1024, 4) == (32, 256)


def test_blocks_hold_whole_rows_where_these_fit():
    # 48 rows would fit; 32 divide all.
    assert tpu_blocks.two_pass_blocks(8192, 32768, 4) == (32, 32768)
    assert tpu_blocks.two_pass_blocks(5, 1000, 4) == (16, 1024)
    # Halves of 160000 columns would fit; fifths of them are whole registers.
    assert tpu_blocks.two_pass_blocks(8192, 160000, 8).columns * 5 == 160000
    assert tpu_blocks.one_pass_blocks(8192, 32768, 2) == (256, 8192)


def test_whole_rows_keep_the_terms_of_every_group(rng, small_groups):
    shape = (3, 14, 700)

    def make_function(implementation):
        return lambda x: {"y": softmax(x, implementation=implementation)}

    inputs = {"x": 20 * rng.normal(size=shape)}
    assert_close(make_function, inputs, {"y": rng.normal(size=shape)}, "float32", "tpu_interpret")


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("shape", "axis"), [((3, 14, 700), -1), ((2, 300, 5), 1), ((40,), 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_with_its_gradient_equals_float64(
    rng, small_blocks, implementation, shape, axis, dtype
):
    inputs = {"x": 2 * rng.normal(size=shape)}

    def make_function(implementation):
        return lambda x: {"y": softmax(x, axis=axis, implementation=implementation)}

    assert_close(make_function, inputs, {"y": rng.normal(size=shape)}, dtype, implementation)


LOWEST, HIGHEST = np.finfo(np.float32).min, np.finfo(np.float32).max
EXTREMES = {
    "large": [1e4, 1e4 - 1, 9990, -1e4],
    "small": [-1e4, -1e4 - 1, -1e4 - 3, -2e4],
    "largest": [HIGHEST, HIGHEST, 0, LOWEST],
    "smallest": [LOWEST, LOWEST, LOWEST, -np.inf],
    "masked": [-1e30, -1e30, -1e30, -1e30],
    "partly masked": [-1e30, 2, -np.inf, 1],
    "all -inf": [-np.inf] * 4,
    "+inf": [1, np.inf, 2, -np.inf],
    "NaN": [1, np.nan, 2, 3],
    "NaN and inf": [-np.inf, np.nan, np.inf, 3],
}


def extreme_rows(rng):
    """The extremes, each spread over rows of 700, whose other entries cannot be seen beside them."""
    rows = np.full((len(EXTREMES), 700), -np.inf, np.float32)
    for row, values in zip(rows, EXTREMES.values(), strict=True):
        row[rng.choice(700, 4, replace=False)] = values
    rows[list(EXTREMES).index("masked")] = -1e30
    return jnp.asarray(rows)


@pytest.mark.parametrize(
    ("implementation", "cut"),
    [*((name, "small_blocks") for name in ALL), ("tpu_interpret", "small_groups")],
)
def test_extremes_are_as_jax_has_them(rng, request, implementation, cut):
    request.getfixturevalue(cut)
    x = extreme_rows(rng)
    want = jax.nn.softmax(x)
    got = softmax(x, implementation=implementation)
    for name, row, expected in zip(EXTREMES, got, want, strict=True):
        np.testing.assert_allclose(row, expected, rtol=1e-6, err_msg=name)
    assert np.isnan(got).any(axis=1).sum() == 4
    labels = jnp.asarray(rng.integers(0, 700, len(x)))
    loss, lse = cross_entropy(x, labels, implementation=implementation)
    want = -jax.nn.log_softmax(x)[jnp.arange(len(x)), labels]
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    # A row of NaN and infinity is NaN by JAX, and here the one or the other.
    single = np.array(list(EXTREMES)) != "NaN and inf"
    np.testing.assert_allclose(lse[single], jax.nn.logsumexp(x, axis=1)[single], rtol=1e-6)


@pytest.mark.parametrize("implementation", FAST)
def test_large_logits_lose_no_digits(rng, small_blocks, implementation):
    """A log-sum-exp of 1e4 is rounded to 1e-3; the loss and its gradient are not made from it."""
    x = jnp.asarray(1e4 + 3 * rng.normal(size=(16, 300)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 300, 16))

    def loss(x, implementation):
        return cross_entropy(x, labels, implementation=implementation)[0].sum()

    with jax.enable_x64(True):
        want = jax.value_and_grad(loss)(jnp.asarray(np.asarray(x), jnp.float64), "reference")
    got = jax.value_and_grad(loss)(x, implementation)
    for value, expected in zip(got, want, strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize(("dtype", "shape"), [("float32", (2, 17, 700)), ("bfloat16", (33, 384))])
def test_cross_entropy_with_its_gradient_equals_float64(
    rng, small_blocks, implementation, dtype, shape
):
    labels = jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    cotangents = {name: rng.normal(size=shape[:-1]) for name in ("loss", "lse")}

    def make_function(implementation):
        def function(logits):
            loss, lse = cross_entropy(logits, labels, implementation=implementation)
            return {"loss": loss, "lse": lse}

        return function

    inputs = {"logits": 4 * rng.normal(size=shape)}
    assert_close(make_function, inputs, cotangents, dtype, implementation)


@pytest.mark.parametrize("implementation", ALL)
def test_cross_entropy_is_optax_s(rng, implementation):
    logits = jnp.asarray(4 * rng.normal(size=(3, 7, 60)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 60, (3, 7)))

    def ours(logits):
        return cross_entropy(logits, labels, implementation=implementation)[0]

    def theirs(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    d_loss = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    (got, pull), (want, pull_theirs) = jax.vjp(ours, logits), jax.vjp(theirs, logits)
    assert relative_error(got, want) < 1e-6
    assert relative_error(pull(d_loss)[0], pull_theirs(d_loss)[0]) < 1e-6


@pytest.mark.parametrize("implementation", ALL)
def test_a_label_outside_has_no_logit(rng, implementation):
    logits = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    loss, lse = cross_entropy(logits, jnp.array([-1, 6, -6, 600]), implementation=implementation)
    np.testing.assert_array_equal(loss, lse)
    gradient = jax.grad(
        lambda x: cross_entropy(x, jnp.full(4, -1), implementation=implementation)[0].sum()
    )(logits)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("chunk_size", "vocabulary", "soft_cap"), [(64, 150, None), (64, 128, 3.0), (None, 40, None)]
)
def test_linear_cross_entropy_with_every_gradient_equals_float64(
    rng, dtype, chunk_size, vocabulary, soft_cap
):
    inputs = {
        "hidden": rng.normal(size=(2, 9, 12)),
        "weight": rng.normal(size=(12, vocabulary)),
    }
    labels = jnp.asarray(rng.integers(-1, vocabulary + 1, (2, 9)))
    cotangents = {name: rng.normal(size=(2, 9)) for name in ("loss", "lse")}

    def make_function(implementation):
        def function(hidden, weight):
            loss, lse = linear_cross_entropy(
                hidden,
                weight,
                labels,
                logits_soft_cap=soft_cap,
                chunk_size=chunk_size,
                implementation=implementation,
            )
            return {"loss": loss, "lse": lse}

        return function

    assert_close(make_function, inputs, cotangents, dtype)


def test_float64_is_kept(rng):
    with jax.enable_x64(True):
        x, labels = jnp.asarray(100 * rng.normal(size=(5, 40))), jnp.arange(5)
        weights = np.exp(np.asarray(x) - np.max(x, axis=1, keepdims=True))
        want = weights / weights.sum(axis=1, keepdims=True)
        for implementation in ("reference", "xla"):
            y = softmax(x, implementation=implementation)
            np.testing.assert_allclose(y, want, rtol=1e-13)
            loss, lse = cross_entropy(x, labels, implementation=implementation)
            np.testing.assert_allclose(jnp.exp(-loss), want[np.arange(5), labels], rtol=1e-12)
            assert y.dtype == loss.dtype == lse.dtype == jnp.float64


def test_no_logits_of_the_whole_vocabulary_are_in_memory():
    tokens, dim = 256, 8

    def gradients(hidden, weight, labels):
        def loss(hidden, weight):
            return linear_cross_entropy(hidden, weight, labels, chunk_size=128)[0].sum()

        return jax.grad(loss, argnums=(0, 1))(hidden, weight)

    def used(vocabulary):
        hidden, weight = jnp.ones((tokens, dim)), jnp.ones((dim, vocabulary))
        return temporary_bytes(gradients, hidden, weight, jnp.zeros(tokens, int))

    # Four times the vocabulary: room for some copies of the weights and for no logits.
    assert used(8192) < used(2048) + 4 * dim * 8192 * 4 < tokens * 8192 * 4


def test_cross_entropy_keeps_no_probabilities():
    logits, labels = jnp.ones((256, 3 * xla.BLOCK)), jnp.zeros(256, int)

    def forward(logits):
        (loss, lse), pull = jax.vjp(
            lambda x: cross_entropy(x, labels, implementation="xla"), logits
        )
        return loss, lse, jax.tree.leaves(pull)

    kept = jax.eval_shape(forward, logits)[2]
    assert sum(x.size for x in kept if x.shape != logits.shape) <= 4 * 256
    assert sum(x.shape == logits.shape for x in kept) == 1  # the logits themselves
    # In passing there is a block of them, at most.
    assert temporary_bytes(lambda x: forward(x)[:2], logits) < 2 * 256 * xla.BLOCK * 4


def arrays_of(rng, rows=40, columns=300):
    x = jnp.asarray(4 * rng.normal(size=(rows, columns)), jnp.float32)
    return x, jnp.asarray(rng.integers(0, columns, rows))


def total_of(implementation, x, labels):
    """A number that every op is part of."""
    loss, lse = cross_entropy(x, labels, implementation=implementation)
    return jnp.sum(jnp.sin(softmax(x, implementation=implementation))) + jnp.sum(loss * lse)


def test_several_steps_of_the_grid_without_races(rng, small_blocks):
    """The interpreter that knows of transfers: it raises at a race, and takes parallel axes in random order."""
    x, labels = arrays_of(rng)
    params = pltpu.InterpretParams(detect_races=True, random_seed=1)

    def total(x, interpret):
        y = tpu.softmax(x, interpret=interpret)
        loss, lse = tpu.cross_entropy(x, labels, interpret=interpret)
        return jnp.sum(jnp.sin(y)) + jnp.sum(loss * lse)

    got, want = (jax.jit(jax.grad(total), static_argnums=1)(x, how) for how in (params, True))
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("implementation", FAST)
def test_under_vmap_and_remat(rng, small_blocks, implementation):
    x, labels = (jnp.stack(both) for both in zip(arrays_of(rng), arrays_of(rng), strict=True))

    def gradient(implementation, wrap=lambda f: f):
        function = wrap(functools.partial(total_of, implementation))
        return jax.jit(jax.vmap(jax.grad(function)))(x, labels)

    want = gradient("reference")
    for wrap in (lambda f: f, jax.remat):
        assert relative_error(gradient(implementation, wrap), want) < 1e-5


def eight_devices(axis_types=(AxisType.Auto,) * 2):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, there are {jax.device_count()}: set XLA_FLAGS")
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axis_types)


@pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("tpu_interpret", marks=pytest.mark.slow)]
)
def test_under_shard_map_with_labels_shared_by_all_devices(rng, small_blocks, implementation):
    x, labels = arrays_of(rng, rows=64)
    labels = labels[:8]

    def per_device(implementation, x, labels):
        return total_of(implementation, x, labels)[None]

    sharded = jax.shard_map(
        functools.partial(per_device, implementation),
        mesh=eight_devices(),
        in_specs=(PartitionSpec(("data", "tensor")), PartitionSpec()),
        out_specs=PartitionSpec(("data", "tensor")),
    )
    got = jax.jit(jax.grad(lambda x: sharded(x, labels).sum()))(x)
    want = jax.grad(lambda x: total_of("reference", x, jnp.tile(labels, 8)))(x)
    assert relative_error(got, want) < 1e-5


def test_linear_cross_entropy_under_shard_map_sums_the_gradient_of_the_weight(rng):
    hidden = jnp.asarray(rng.normal(size=(16, 6)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(6, 50)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 50, 16))
    rows = PartitionSpec(("data", "tensor"))

    def loss(hidden, weight, labels):
        return linear_cross_entropy(hidden, weight, labels, chunk_size=16)[0]

    sharded = jax.shard_map(
        loss, mesh=eight_devices(), in_specs=(rows, PartitionSpec(), rows), out_specs=rows
    )

    def gradients(function):
        def total(hidden, weight):
            return jnp.sum(jnp.sin(function(hidden, weight, labels)))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, weight)

    for got, want in zip(gradients(sharded), gradients(loss), strict=True):
        assert relative_error(got, want) < 1e-5


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((2, 4096, 32768), "bfloat16"),
        ((4, 1000, 50257), "float32"),
        ((3, 300000), "bfloat16"),
        ((2, 12, 512, 512), "float32"),
        ((5,), "float32"),
    ],
)
def test_compiles_for_tpu(chip, shape, dtype):
    def both(x, labels):
        y, pull = jax.vjp(softmax, x)
        outputs, pull_loss = jax.vjp(lambda x: cross_entropy(x, labels), x)
        return y, pull(y), outputs, pull_loss(outputs)

    x, labels = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:-1], "int32")
    compiled = topology.compile_for(chip, both, x, labels)
    # The cross-entropy's gradient is elementwise and XLA's.
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    if len(shape) > 2:
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * np.prod(shape) / 8


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_inside_a_sharded_step(chip):
    """The vocabulary's loss on four chips, each with [2, 512] tokens."""
    mesh = topology.mesh(f"{chip}:2x2", (4,))
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def losses(hidden, weight, labels):
        logits = hidden @ weight
        chunked, _ = linear_cross_entropy(hidden, weight, labels)
        return cross_entropy(logits, labels)[0] + chunked + softmax(logits)[..., 0]

    sharded = jax.shard_map(losses, mesh=mesh, in_specs=(rows, whole, rows), out_specs=rows)

    def step(hidden, weight, labels):
        return jax.grad(lambda *x: sharded(*x, labels).sum(), argnums=(0, 1))(hidden, weight)

    def shape(axes, dtype, spec):
        return jax.ShapeDtypeStruct(axes, dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        compiled = jax.jit(step).lower(
            shape((8, 512, 256), "bfloat16", rows),
            shape((256, 4096), "bfloat16", whole),
            shape((8, 512), "int32", rows),
        )
        text = compiled.compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "all-reduce" in text  # of the weight's gradient


@needs_libtpu
def test_linear_cross_entropy_holds_one_chunk_of_logits_on_tpu():
    tokens, dim, vocabulary = 1024, 128, 16384

    def gradients(hidden, weight, labels):
        def loss(hidden, weight):
            return linear_cross_entropy(hidden, weight, labels)[0].sum()

        return jax.grad(loss, argnums=(0, 1))(hidden, weight)

    shape = functools.partial(jax.ShapeDtypeStruct, dtype="bfloat16")
    labels = jax.ShapeDtypeStruct((tokens,), "int32")
    compiled = topology.compile_for(
        "v5e", gradients, shape((tokens, dim)), shape((dim, vocabulary)), labels
    )
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 2 / 2


def test_bad_input_is_named():
    x, labels = jnp.ones((4, 6)), jnp.zeros(4, int)
    hidden, weight = jnp.ones((4, 3)), jnp.ones((3, 6))
    bad = [
        (lambda: softmax(x, axis=2), r"softmax: axis must be an int from -2 to 1, not 2"),
        (lambda: softmax(x, axis=(0, 1)), r"axis must be an int .* not \(0, 1\)"),
        (lambda: softmax(labels), "softmax: x must be floating point, not int32"),
        (lambda: softmax(jnp.ones(())), "softmax: x must have an axis"),
        (lambda: softmax(jnp.ones((4, 0))), "softmax: x has an axis of size 0"),
        (lambda: softmax(x, implementation="fast"), "'fast' is unknown"),
        (lambda: cross_entropy(x, labels[:3]), r"labels must be of shape \(4,\), .* not \(3,\)"),
        (lambda: cross_entropy(x, x[:, 0]), "labels must be integer, not float32"),
        (lambda: cross_entropy(x, labels, implementation="tpu"), r"runs on \['tpu'\] only"),
        (lambda: linear_cross_entropy(hidden, weight[:2], labels), r"weight must be \[D=3, V\]"),
        (
            lambda: linear_cross_entropy(hidden, weight.astype("bfloat16"), labels),
            "weight has dtype bfloat16 but hidden has float32",
        ),
        (
            lambda: linear_cross_entropy(hidden, weight, labels, logits_soft_cap=0.0),
            r"logits_soft_cap must be positive or None, not 0\.0",
        ),
        (
            lambda: linear_cross_entropy(hidden, weight, labels, chunk_size=0),
            "chunk_size must be a positive int or None, not 0",
        ),
        (
            lambda: softmax(x.astype("float16"), implementation="tpu_interpret"),
            "cannot: dtype float16; the kernels take float32 and bfloat16",
        ),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
