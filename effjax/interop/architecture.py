"""What a family of checkpoints is: its config and its tensors, each as a mapping between theirs and ours."""

import dataclasses
import re
from collections.abc import Callable, Container, Mapping
from typing import Any

import flax.linen as nn

from effjax import registry
from effjax.ffn import Gated
from effjax.ffn.dense import gated_width
from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.interop.table import Layers, Row, plain_layers
from effjax.mixers import Attention, Mamba, Mamba2, SlidingWindow, TaylorLinear
from effjax.models import SequenceModel

# Fields that decide how a model is computed or trained, and not what it computes from given parameters.
_FREE: tuple[str, ...] = (
    "aux_weight",
    "balance_weight",
    "capacity_factor",
    "capacity_warmup_steps",
    "chunk_size",
)
_FREE += (
    "dispatch",
    "dtype",
    "implementation",
    "init_scale",
    "jitter",
    "num_microbatches",
    "pooler",
    "remat",
    "scan_layers",
)
_FREE += ("warmup_progress", "z_weight")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A class of transformers, as it is named in `config.json`.

    Attributes:
      name: the class.
      model_type: transformers' name for its config.
      table: its tensors and our parameters.
      read: the model that a config describes.
      write: the entries that describe a model; it may leave out what its config has no entry for.
      parts: the parts of a model that `write` understands, by field.
      unused: patterns (`fnmatch`) of tensors that some checkpoints hold although others determine them, or although
        the model has no use for them.
      renamed: (pattern, replacement), regular expressions for names that some checkpoints have instead of the table's.
      layers: the names of the layers of a model.
      known_by: an entry that no other architecture has, if there is one.
      complete: the model of a config with the parts of which only a checkpoint's tensors tell, by the names of these.
    """

    name: str
    model_type: str
    table: tuple[Row, ...]
    read: Callable[[Entries], SequenceModel]
    write: Callable[[SequenceModel], dict[str, Any]]
    parts: Mapping[str, tuple[type, ...]]
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    layers: Callable[[SequenceModel], Layers] = plain_layers
    known_by: str | None = None
    complete: Callable[[SequenceModel, Container[str]], SequenceModel] = lambda model, _: model

    def rename(self, name: str) -> str:
        """The table's name of a tensor of a checkpoint."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def model(self, entries: Entries) -> SequenceModel:
        """The model that a config describes.

        Raises:
          InteropError: for an entry that is missing, malformed, or asks for what we lack.
        """
        for name in ("quantization_config", "pruned_heads"):
            entries.only(name, None, {})
        for name in ("add_cross_attention", "is_encoder_decoder"):
            entries.only(name, False)
        try:
            return self.read(entries)
        except InteropError:
            raise
        except (ArithmeticError, ValueError) as error:  # a part refuses its fields
            raise InteropError(f"{entries.where}: {error}") from error

    def config(self, model: SequenceModel) -> dict[str, Any]:
        """The config that describes a model.

        Raises:
          InteropError: if none of this architecture does, naming the first fields that it lacks.
        """
        lacks = self.lacks(model)
        if lacks:
            raise InteropError(f"{self.name} cannot express {'; '.join(lacks[:4])}")
        return self._config(spelled_out(model))

    def lacks(self, model: SequenceModel) -> list[str]:
        """What this architecture cannot express of a model; nothing for one that it can.

        The config is written, read again and compared, so that whatever it has no entry for is found.
        """
        if foreign := self.foreign(model):
            return foreign
        model = spelled_out(model)
        try:
            back = spelled_out(self.model(Entries(self._config(model), self.name)))
        except InteropError as error:
            return [str(error)]
        ours, theirs = (_function(m) for m in (model, back))
        absent = object()
        return [
            f"{name}={ours.get(name)!r} (it has {theirs.get(name)!r})"
            for name in sorted(ours.keys() | theirs.keys())
            if ours.get(name, absent) != theirs.get(name, absent)
        ]

    def foreign(self, model: SequenceModel) -> list[str]:
        """The parts of a model that this architecture has none like."""
        model = spelled_out(model)
        return [
            f"{field}={registry.describe(part)}"
            for field, known in self.parts.items()
            for part in (
                dict.fromkeys(model.mixers) if field == "mixers" else [getattr(model, field)]
            )
            if type(part) not in known
        ]

    def _config(self, model: SequenceModel) -> dict[str, Any]:
        written = self.write(model)
        return {"architectures": [self.name], "model_type": self.model_type, **written}


def part_of[Part](part: nn.Module | None, kind: type[Part]) -> Part:
    """The part of a model, which is of the kind that the `parts` of an `Architecture` ask for.

    Raises:
      InteropError: if it is not.
    """
    if not isinstance(part, kind):
        raise InteropError(f"the model has {registry.describe(part)}; valid: {kind.__name__}")
    return part


def spelled_out(model: SequenceModel) -> SequenceModel:
    """The same function, with a mixer for every layer and each size that follows from others given."""
    mixers = tuple(
        _mixer(model.mixers[i % len(model.mixers)], model.d_model) for i in range(model.num_layers)
    )
    ffn = model.ffn
    if ffn is not None and getattr(ffn, "hidden_dim", 0) is None:
        is_gated = isinstance(ffn, Gated) or getattr(ffn, "gated", False)
        width = gated_width(model.d_model) if is_gated else 4 * model.d_model
        ffn = ffn.clone(hidden_dim=width)
    return model.clone(mixers=mixers, ffn=ffn)


def _mixer(mixer: Any, d_model: int) -> Any:
    if isinstance(mixer, SlidingWindow):  # attention with another default
        mixer = Attention(**{name: getattr(mixer, name) for name in registry.fields(Attention)})
    if type(mixer) is Attention:
        kv_heads, head_dim = mixer.dims(d_model)
        scale = head_dim**-0.5 if mixer.logits_scale is None else mixer.logits_scale
        return mixer.clone(num_kv_heads=kv_heads, head_dim=head_dim, logits_scale=scale)
    if type(mixer) is TaylorLinear:
        return mixer.clone(head_dim=mixer.value_dim(d_model))
    if type(mixer) is Mamba:
        return mixer.clone(step_rank=mixer.dims(d_model)[1])
    if type(mixer) is Mamba2:
        return mixer.clone(norm_groups=mixer.norm_groups or mixer.num_groups)
    return mixer


def _function(model: SequenceModel) -> dict[str, Any]:
    """The plain values of a model's fields by dotted path, but for the free ones."""
    fields = registry.plain_fields(registry.describe_fields(model))
    return {path: value for path, value in fields if path.rpartition(".")[2] not in _FREE}
