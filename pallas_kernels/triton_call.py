"""How an op calls a Triton kernel: compiled into the program by jax_triton, or interpreted on the host.

Every array of a kernel leads with the batch, and its programs are those of one row of the batch times the batch. A
`jax.vmap` therefore is a larger batch.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from triton.runtime import JITFunction

from pallas_kernels import triton_interpreter
from pallas_kernels.varying import vary_alike


class Launch(NamedTuple):
    """How the compiler spreads a program over a multiprocessor.

    Attributes:
        num_warps: warps of 32 threads.
        num_stages: tiles of a loop that are on their way from HBM at a time.
    """

    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict:
        """For the compiler, which else goes by its release.

        `a * b + c` is one instruction. The PTX is for the assembler of CUDA 12.8 and later: that of JAX, which makes it
        machine code, may be older than Triton's own.
        """
        return {**self._asdict(), "enable_fp_fusion": True, "ptx_version": 87}


def call(
    kernel: JITFunction,
    arguments: Sequence[jax.Array | None],
    *,
    out: Sequence[jax.ShapeDtypeStruct],
    programs: int,
    constants: dict,
    launch: Launch,
    interpret: bool,
) -> list[jax.Array]:
    """Runs `programs` programs of a kernel for each row of the batch.

    Args:
        kernel: takes pointers to the arguments, None where one is, pointers to the outputs, and `constants`. Its
            program i is the program i % programs of the row i // programs.
        arguments: arrays [B, ...] or None.
        out: shape without the batch and dtype of each output.
        programs: number of programs for a row.
        constants: the `tl.constexpr` parameters by name.
        launch: for the compiler.
        interpret: run on the host by Triton's interpreter.
    """

    @jax.custom_batching.custom_vmap
    def run(*arguments):
        batch = jax.tree.leaves(arguments)[0].shape[0]
        types = [jax.ShapeDtypeStruct((batch, *x.shape), x.dtype) for x in out]
        grid = (programs * batch,)
        if interpret:
            function = functools.partial(_interpret, kernel, types, grid, constants)
            results = jax.pure_callback(function, types, *arguments)
        else:
            results = _compiled(kernel, arguments, types, grid, constants, launch)
        # Neither of the two says over which mesh axes its results vary.
        return vary_alike((results, arguments))[0]

    @run.def_vmap
    def run_larger_batch(size, is_batched, *arguments):
        def fold(x, is_batched):
            if not is_batched:
                x = jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = run(*jax.tree.map(fold, arguments, tuple(is_batched)))
        unfolded = [x.reshape(size, -1, *x.shape[1:]) for x in results]
        return unfolded, [True] * len(unfolded)

    return run(*arguments)


def _compiled(kernel, arguments, types, grid, constants, launch: Launch):
    # Imported here, because only GPUs need it and it takes as long as Triton.
    import jax_triton

    return jax_triton.triton_call(
        *arguments,
        kernel=kernel,
        out_type=types,
        grid=grid,
        name=kernel.fn.__name__,
        backend_options=launch.options,
        **constants,
    )


def _interpret(kernel, types, grid, constants, *arguments):
    return triton_interpreter.run(kernel, arguments, types, grid=grid, constants=constants)
