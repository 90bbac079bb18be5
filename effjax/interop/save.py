"""From a model and its parameters to a Hugging Face folder."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from effjax.interop import families
from effjax.interop.entries import CONFIG_FILE, Entries, read_config
from effjax.interop.error import InteropError
from effjax.interop.neutral import NEUTRAL
from effjax.interop.shards import some, write_shards
from effjax.interop.table import Leaf, bind
from effjax.interop.variables import arrays_of, check_arrays
from effjax.models import SequenceModel

# What a folder has besides the model: all that the tokenizer is, and how to generate.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)

_Part = tuple[Leaf, tuple[int, ...]]


def save_hf(
    path: str | Path,
    model: SequenceModel,
    variables: Mapping[str, Any],
    *,
    architecture: str | None = None,
    like: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a folder that `load_hf` and transformers read: `config.json`, safetensors, and the files of a tokenizer.

    Parameters keep their dtype and their bits. `config.json` is written last: a folder that has one is complete.

    Args:
      path: the folder to make; it may exist, but not with a model in it.
      model: the model.
      variables: its `{"params": ...}`.
      architecture: which to write it as, "LlamaForCausalLM" or another of `families.names()`. None takes that of
        `like` or, without it, the first that has everything that the model has.
      like: a folder from which tokenizer files and what else says nothing of the model's function (ids of special
        tokens, generation_config.json) are carried over: the one that the model was loaded from, or one with nothing
        but a tokenizer.
      max_shard_bytes: of one file; what is more goes to several, with an index.

    Raises:
      InteropError: if no architecture, or not that one, can express the model, naming what it lacks; if the variables
        are not the model's; or if there is a model in the folder already.
    """
    folder, source = Path(path), None if like is None else Path(like)
    if max_shard_bytes < 1:
        raise InteropError(f"max_shard_bytes is {max_shard_bytes}; valid: at least 1")
    _check_vacant(folder)
    before = _entries(source)
    known = families.of_model(model, architecture or _architecture(before))
    config = {**_carried(before), **known.config(model)}
    arrays = arrays_of(variables)
    leaves = bind(known.table, model, known.layers(model))
    check_arrays(arrays, {leaf.path: leaf.shape for leaf in leaves})
    config["torch_dtype"] = str(arrays["embed/embedding"].dtype)
    parts = _placed(leaves, arrays)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tensors(folder, parts, arrays, max_shard_bytes)
    for name in COMPANIONS:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", "utf-8")


def _placed(leaves: list[Leaf], arrays: Mapping[str, Any]) -> dict[str, list[_Part]]:
    """For each tensor the parameters that lie in it, each with the index of our leading axes."""
    parts: dict[str, list[_Part]] = {}
    for leaf in leaves:
        for where in np.ndindex(leaf.names.shape):
            for name in (leaf.names[where], *leaf.copies[where]):
                parts.setdefault(name, []).append((leaf, where))
    for name, within in parts.items():
        dtypes = sorted({str(arrays[leaf.path].dtype) for leaf, _ in within})
        if len(dtypes) > 1:
            raise InteropError(
                f"the parameters within tensor {name} are of {some(dtypes)}; valid: one dtype"
            )
    return parts


def _write_tensors(
    folder: Path, parts: Mapping[str, list[_Part]], arrays: Mapping[str, Any], max_bytes: int
) -> None:
    def tensor(name: str) -> np.ndarray:
        first, _ = parts[name][0]
        whole = np.empty(first.tensor_shape, arrays[first.path].dtype)
        for leaf, where in parts[name]:
            # Indexed before it is fetched, so that no stack of layers or experts is on the host at once.
            part = np.asarray(arrays[leaf.path][where] if where else arrays[leaf.path])
            spans = tuple(slice(s.start, s.stop) for s in leaf.their_spans())
            whole[spans] = leaf.as_theirs(part)
        return whole

    def num_bytes(name: str) -> int:
        first, _ = parts[name][0]
        return math.prod(first.tensor_shape) * arrays[first.path].dtype.itemsize

    write_shards(folder, {name: num_bytes(name) for name in sorted(parts)}, tensor, max_bytes)


def _check_vacant(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InteropError(f"{folder} is a file; valid: a folder")
    taken = sorted(
        f.name for pattern in (CONFIG_FILE, "*.safetensors*") for f in folder.glob(pattern)
    )
    if taken:
        raise InteropError(
            f"{folder} has a model in it ({some(taken)}); valid: a folder without one"
        )


def _entries(source: Path | None) -> dict[str, Any]:
    if source is None:
        return {}
    if not source.is_dir():
        raise InteropError(f"like is {str(source)!r}, which is no folder; valid: an existing one")
    return read_config(source) if (source / CONFIG_FILE).is_file() else {}


def _architecture(before: Mapping[str, Any]) -> str | None:
    return families.of_config(Entries(before, "like")).name if before else None


def _carried(before: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that say nothing of the model's function, but for those that say how it is stored."""
    stored = ("dtype", "torch_dtype", "transformers_version")
    return {k: v for k, v in before.items() if k in NEUTRAL and k not in stored}
