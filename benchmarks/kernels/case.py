"""A case: an op at a shape, with all that compete at it; and the programs of it that are measured."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks.kernels.roofline import Work
from pallas_kernels import topology
from pallas_kernels.bundles import Kernel
from pallas_kernels.dispatch import Implementation

FORWARD, BOTH = "forward", "forward+backward"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute a case.

    Attributes:
        name: of the implementation or of the peer.
        function: called with the case's arrays by name; returns an array.
        is_peer: whether it is somebody else's.
        platforms: where it runs; None: everywhere.
        has_schedule: whether its program is compiled for TPUs. What has a `while` of XLA is not: a schedule is of the
            loop's body, and does not say how often that runs.
        steps: the grid steps that compute, of a kernel whose grid is known at run time only or that skips tiles of
            it; None for a kernel of which the dump says so itself.
    """

    name: str
    function: Callable[..., jax.Array]
    is_peer: bool = True
    platforms: tuple[str, ...] | None = None
    has_schedule: bool = False
    steps: Callable[[Kernel], int | None] = lambda kernel: None


@dataclasses.dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
        op: a key of `pallas_kernels.OPS`.
        shape: the shape in words.
        make_inputs: (key, dtype) -> arrays by name.
        contenders: what competes.
        work: ways to do a pass, by its name; the passes that are measured.
        stored: names of inputs that stay as they are between calls; around the others are projections.
    """

    op: str
    shape: str
    make_inputs: Callable[[jax.Array, jnp.dtype], dict[str, jax.Array]]
    contenders: tuple[Contender, ...]
    work: Mapping[str, Sequence[Work]]
    stored: tuple[str, ...] = ()


def implementations(
    function: Callable, table: Mapping[str, Implementation], **options
) -> tuple[Contender, ...]:
    """Contenders of an op's own implementations, without the interpreters, whose time means nothing.

    Args:
        function: the op.
        table: its `IMPLEMENTATIONS`.
        **options: of the contender whose kernels are for TPU.
    """
    return tuple(
        Contender(
            name=name,
            function=functools.partial(function, implementation=name),
            is_peer=False,
            platforms=entry.platforms,
            has_schedule=entry.platforms == ("tpu",),
            **(options if entry.platforms == ("tpu",) else {}),
        )
        for name, entry in table.items()
        if not name.endswith("_interpret")
    )


def program(case: Case, contender: Contender, measured: str) -> Callable:
    """The function of a pass, of inputs and the gradient of the output as `flat` makes them; so it returns its results.

    Args:
        case: what is computed.
        contender: by what.
        measured: `FORWARD` for the output; `BOTH` for the output and the gradients of all inputs of floats.
    """

    def forward(inputs, d_out):
        return contender.function(**inputs)

    def both(inputs, d_out):
        floats = {name: x for name, x in inputs.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        out, pull = jax.vjp(lambda floats: contender.function(**(inputs | floats)), floats)
        return out, pull(d_out.reshape(out.shape))

    def run(inputs, d_out):
        whole = {name: x.reshape(like[name].shape) for name, x in inputs.items()}
        return side_by_side({FORWARD: forward, BOTH: both}[measured](whole, d_out))

    like = shapes(case, jnp.float32)
    return run


def compile_pass(case: Case, contender: Contender, measured: str, chip: str) -> jax.stages.Compiled:
    """Compiles a pass in bfloat16 for a chip that is not here, as `pallas_kernels.topology` names it."""
    inputs = shapes(case, jnp.bfloat16)
    with jax.set_mesh(topology.mesh(chip)):
        d_out = jax.eval_shape(side_by_side, out_shape(contender, inputs))
    inputs = jax.eval_shape(functools.partial(flat, case), inputs)
    return topology.compile_for(chip, program(case, contender, measured), inputs, d_out)


def flat(case: Case, inputs: dict) -> dict:
    """Inputs as the projections before an op leave them."""
    return {name: x if name in case.stored else side_by_side(x) for name, x in inputs.items()}


def side_by_side(arrays):
    """[B, T, H, D] -> [B, T, H * D], as the projections around an op leave and take them.

    Else a program would begin and end with copies to and from the layout that XLA likes best for [B, T, H, D].
    """
    return jax.tree.map(lambda x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x, arrays)


def shapes(case: Case, dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs as shapes."""
    return jax.eval_shape(lambda: case.make_inputs(jax.random.key(0), dtype))


def out_shape(contender: Contender, inputs: dict) -> jax.ShapeDtypeStruct:
    """The output as a shape."""
    return jax.eval_shape(lambda inputs: contender.function(**inputs), inputs)


def num_bytes(case: Case, measured: str, dtype) -> int:
    """Bytes of inputs and output; with the backward also of inputs and d_out, read again, and of the gradients."""
    inputs = shapes(case, dtype)
    # An output is the same whoever computes it; the last implementation is the reference.
    own = [contender for contender in case.contenders if not contender.is_peer]
    out = _bytes([out_shape(own[-1], inputs)])
    total = _bytes(inputs.values()) + out
    if measured == BOTH:
        floats = [x for x in inputs.values() if jnp.issubdtype(x.dtype, jnp.floating)]
        total += _bytes(inputs.values()) + out + _bytes(floats)
    return total


def _bytes(arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in arrays)
