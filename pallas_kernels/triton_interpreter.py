"""Triton kernels over NumPy arrays, by Triton's own interpreter: their semantics, without a GPU and without torch.

Triton chooses between compiler and interpreter when a kernel is defined, from the environment (TRITON_INTERPRET=1), for
a process as a whole, and takes torch's tensors. Here a kernel that is defined for the compiler is interpreted as well,
in the process that compiles others, over arrays of NumPy. Beside that bfloat16 is mended, whose bits the interpreter
keeps as integers: `tl.dot` would multiply these, and a cast to it truncate where the hardware rounds.

What stays unlike the hardware: programs of a grid run one after the other, so that races do not show; float32 products
are exact whatever their `input_precision`; and in elementwise arithmetic bfloat16 is still its bits, so that a kernel
has to compute in float32.
"""

import contextlib
import functools
import threading
import types

import jax.numpy as jnp
import numpy as np
import triton.language as tl
from triton.runtime import JITFunction, interpreter

# The interpreter keeps the index of the running program in a global object, and patches `triton.language`.
_one_at_a_time = threading.Lock()


def run(kernel: JITFunction, arguments, out, *, grid: tuple[int, ...], constants: dict) -> list:
    """Runs every program of a grid.

    Args:
        kernel: takes pointers to `arguments`, None where an argument is, pointers to the outputs, and `constants`.
        arguments: arrays, which the kernel does not write to, or None.
        out: shape and dtype of each output.
        grid: programs along up to three axes.
        constants: the kernel's `tl.constexpr` parameters by name.

    Returns:
        Arrays of NumPy. What no program writes is NaN, or the greatest integer.
    """
    inputs = [None if x is None else _Buffer(np.ascontiguousarray(x)) for x in arguments]
    outputs = [_Buffer(_unwritten(x.shape, x.dtype)) for x in out]
    with _one_at_a_time, _interpreting(), np.errstate(all="ignore"):
        function = _function(kernel.fn)
        execute = interpreter.GridExecutor(function, kernel.arg_names, grid)
        execute(*inputs, *outputs, **constants)
    return [x.array for x in outputs]


def _unwritten(shape, dtype) -> np.ndarray:
    fill = jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
    return np.full(shape, fill, dtype)


class _Buffer:
    """An array of NumPy as the interpreter wants a tensor, which it would copy to the CPU and back."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Buffer":
        return self

    cpu = untyped_storage

    def new_empty(self, *shape, device) -> "_Buffer":
        return self

    def size(self) -> None:
        """Nobody asks for more than a pointer."""

    stride = storage_offset = size

    def set_(self, *storage) -> None:
        """It is the same storage."""

    copy_ = set_


@functools.cache
def _function(body: types.FunctionType):
    """The body of a kernel as the interpreter rewrites it, in a namespace of its own, to which more is added."""
    # The interpreter patches the modules that a kernel can see. Functions of Triton itself see this one.
    namespace = {**body.__globals__, "_triton_language_core": tl.core}
    copy = types.FunctionType(
        body.__code__, namespace, body.__name__, body.__defaults__, body.__closure__
    )
    functools.update_wrapper(copy, body)
    return interpreter.FunctionRewriter(copy).rewrite_ast()


@contextlib.contextmanager
def _interpreting():
    """Lets kernels call jitted functions, which raises outside of the compiler, and mends bfloat16."""
    builder = interpreter.interpreter_builder
    cast, dot = functools.partial(_cast, builder), functools.partial(_dot, builder)
    with (
        _replaced(JITFunction, "__call__", _call),
        _replaced(builder, "cast_impl", cast),
        _replaced(builder, "create_dot", dot),
    ):
        yield


@contextlib.contextmanager
def _replaced(owner, name: str, value):
    """Gives `owner` an attribute for a while."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _call(self: JITFunction, *arguments, **options):
    return _function(self.fn)(*arguments, **options)


def _cast(builder, source, dtype):
    source = _widened(source)
    if dtype.scalar == tl.bfloat16:
        rounded = source.data.astype(jnp.bfloat16).view(np.uint16)
        return interpreter.TensorHandle(rounded, tl.bfloat16)
    return type(builder).cast_impl(builder, source, dtype)


def _dot(builder, x, y, *arguments):
    return type(builder).create_dot(builder, _widened(x), _widened(y), *arguments)


def _widened(x):
    """bfloat16 -> float32; anything else as it is."""
    if x.dtype.scalar != tl.bfloat16:
        return x
    bits = np.ascontiguousarray(x.data)
    return interpreter.TensorHandle(bits.view(jnp.bfloat16).astype(np.float32), tl.float32)
