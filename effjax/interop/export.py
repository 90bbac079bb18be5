"""Models as compiled-ahead programs: a folder that runs with JAX alone, without this library.

A program a platform, traced for it, so that each has the kernels that the platform's model would run on; the
parameters lie beside them once. The programs are StableHLO with JAX's promise of compatibility (`jax.export`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.export
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxtyping import Array, Int
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from effjax.interop.error import InteropError
from effjax.interop.shards import SINGLE_FILE, some
from effjax.interop.table import parameter_shapes
from effjax.interop.variables import arrays_of, check_arrays
from effjax.models import SequenceModel

MANIFEST = "export.json"

# What each program is traced for; one for TPU runs on every generation, with the block sizes of this one.
_DEVICES = {
    "cpu": AbstractDevice("cpu", None, "cpu"),
    "tpu": AbstractDevice("TPU v5 lite", 1, "tpu"),
    "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"),
}
PLATFORMS = tuple(_DEVICES)


def save_export(
    path: str | Path,
    model: SequenceModel,
    variables: Mapping[str, Any],
    *,
    batch_size: int,
    length: int,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes a folder with the model's forward pass as programs, and its parameters as safetensors.

    Programs are made for any platform on any host. `export.json` is written last: a folder that has one is complete.
    A mixture of experts with a capacity drops tokens by the `length` that the program is made for, and none with
    `dispatch="dropless"`.

    Args:
      path: the folder to make; it may exist, but not with an export in it.
      model: the model.
      variables: its `{"params": ...}`.
      batch_size: rows that a program takes.
      length: tokens of a row.
      platforms: of "cpu", "tpu" and "cuda".

    Raises:
      InteropError: for sizes or a platform that are not valid, variables that are not the model's, or if there is an
        export in the folder already.
    """
    folder = Path(path)
    if (folder / MANIFEST).exists():
        raise InteropError(f"{folder} has an export already; valid: another folder")
    if batch_size < 1 or not 1 <= length <= model.max_seq_len:
        raise InteropError(
            f"batch_size={batch_size}, length={length}; valid: at least 1, and 1 to max_seq_len={model.max_seq_len}"
        )
    if unknown := sorted(set(platforms) - set(PLATFORMS)):
        raise InteropError(f"platforms has {unknown}; valid: of {list(PLATFORMS)}")
    if not platforms:
        raise InteropError(f"platforms is empty; valid: of {list(PLATFORMS)}")
    params = arrays_of(variables)
    check_arrays(params, parameter_shapes(model))
    programs = {name: _traced(name, model, params, batch_size, length) for name in platforms}
    folder.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        _program_file(folder, name).write_bytes(program.serialize())
    save_file(params, folder / SINGLE_FILE)
    manifest = {"batch_size": batch_size, "length": length, "platforms": list(platforms)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def load_export(path: str | Path, platform: str | None = None) -> "Exported":
    """The program of an export for a platform, with the parameters.

    Args:
      path: the folder.
      platform: "cpu", "tpu" or "cuda"; None: that of the default device.

    Raises:
      InteropError: for a folder that has no export or none for the platform, or a file that is missing or broken.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        batch_size, length, platforms = (
            manifest[key] for key in ("batch_size", "length", "platforms")
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InteropError(f"{folder / MANIFEST} is no manifest of an export: {error!r}") from error
    if platform is None:
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in platforms:
        raise InteropError(f"{folder} has no program for {platform!r}; valid: {some(platforms)}")
    file = _program_file(folder, platform)
    try:
        program = jax.export.deserialize(bytearray(file.read_bytes()))
        file = folder / SINGLE_FILE
        params = load_file(file)
    except Exception as error:  # what comes of broken bytes depends on where they are broken
        is_clear = isinstance(error, OSError | SafetensorError | ValueError | TypeError)
        what = str(error) if is_clear else f"{type(error).__name__}: {error}"
        raise InteropError(f"{file} is missing or broken: {what}") from None
    return Exported(program, params, batch_size, length)


@dataclasses.dataclass(frozen=True)
class Exported:
    """A program with its parameters; called with tokens, it returns what the model's head gives.

    Attributes:
      program: of parameters by path, tokens [batch_size, length] and segment ids.
      params: the parameters by path.
      batch_size: most rows of a call.
      length: most tokens of a row.
    """

    program: jax.export.Exported
    params: dict[str, Array]
    batch_size: int
    length: int

    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "B T"],
        segment_ids: Int[Array | np.ndarray, "B T"] | None = None,
    ) -> dict[str, Array]:
        """Runs the program; fewer rows or tokens than it takes are padded, and the padding is cut off again.

        Returns:
          Those of `logits` [B, T, V], `embeddings` [B, E] and `class_logits/<n>` [B, C] that the model has
          (`effjax.models.Output`).

        Raises:
          ValueError: for arrays of another rank, or more rows or tokens than the program takes.
        """
        ids = np.asarray(tokens)
        segments = np.ones_like(ids) if segment_ids is None else np.asarray(segment_ids)
        fits = ids.ndim == 2 and all(
            1 <= size <= most
            for size, most in zip(ids.shape, (self.batch_size, self.length), strict=True)
        )
        if not fits or segments.shape != ids.shape:
            raise ValueError(
                f"tokens has shape {ids.shape} and segment_ids {segments.shape}; "
                f"valid: both [batch, time], at most [{self.batch_size}, {self.length}]"
            )
        num_rows, num_tokens = ids.shape
        room = ((0, self.batch_size - num_rows), (0, self.length - num_tokens))
        padded = (np.pad(array.astype(np.int32), room) for array in (ids, segments))
        found = self.program.call(self.params, *padded)
        return {
            name: array[:num_rows, :num_tokens] if name == "logits" else array[:num_rows]
            for name, array in found.items()
        }


def _traced(
    platform: str, model: SequenceModel, params: Mapping[str, Any], batch_size: int, length: int
) -> jax.export.Exported:
    device = _DEVICES[platform]
    tokens = jax.ShapeDtypeStruct((batch_size, length), np.int32)
    shapes = {
        path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()
    }
    # The mesh says to the kernels for which device they are traced.
    chip = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(chip):
        return jax.export.export(jax.jit(_forward(model)), platforms=[platform])(
            shapes, tokens, tokens
        )


def _forward(model: SequenceModel) -> Callable[..., dict[str, Array]]:
    def forward(params, tokens, segment_ids):
        tree = {"params": flax.traverse_util.unflatten_dict(params, sep="/")}
        output = model.apply(tree, tokens, segment_ids=segment_ids)
        found = {"logits": output.logits, "embeddings": output.embeddings}
        for size, logits in (output.class_logits or {}).items():
            found[f"class_logits/{size}"] = logits
        return {name: array for name, array in found.items() if array is not None}

    return forward


def _program_file(folder: Path, platform: str) -> Path:
    return folder / f"{platform}.stablehlo"
