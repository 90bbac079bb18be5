"""The families of Hugging Face checkpoints that are read and written: a file each, its architectures in a tuple."""

from effjax.interop.architecture import Architecture
from effjax.interop.entries import Entries
from effjax.interop.error import InteropError
from effjax.interop.families import based, bert, gemma, gpt2, llama, mamba, mixture, mor
from effjax.models import SequenceModel
from effjax.registry import unknown

# A model that several can express is written as the first of them.
ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for family in (llama, mixture, gemma, mamba, gpt2, bert, based, mor)
    for architecture in family.ARCHITECTURES
}


def names() -> list[str]:
    """The architectures that can be read and written, as `config.json` names them."""
    return sorted(ARCHITECTURES)


def of_config(entries: Entries) -> Architecture:
    """The architecture of a config: the one that it names, or that of its `model_type` if it names none.

    An entry that only one architecture has goes before both: some authors' code names another, or none.

    Raises:
      InteropError: if that is none of ours, naming it, the nearest of ours and all of them.
    """
    named = entries.get("architectures", list | None, None)
    for architecture in ARCHITECTURES.values():
        if architecture.known_by in entries.values:
            return architecture
    if named:
        return _lookup(str(named[0]), entries.where)
    model_type = entries.get("model_type", str)
    by_type = {a.model_type: a for a in reversed(ARCHITECTURES.values())}
    if model_type not in by_type:
        raise InteropError(f"{entries.where}: {unknown('model_type', model_type, by_type)}")
    return by_type[model_type]


def of_model(model: SequenceModel, name: str | None) -> Architecture:
    """The architecture of that name, or without one the first that can express the model.

    Raises:
      InteropError: if none has that name, or none can express the model; then with what the nearest of them lacks.
    """
    if name is not None:
        return _lookup(name, "architecture")
    lacks = {}
    for architecture in ARCHITECTURES.values():
        lacks[architecture.name] = architecture.lacks(model)
        if not lacks[architecture.name]:
            return architecture
    foreign = {name: len(known.foreign(model)) for name, known in ARCHITECTURES.items()}
    nearest = min(lacks, key=lambda name: (foreign[name], len(lacks[name])))
    raise InteropError(
        f"no architecture expresses this model; the nearest, {nearest}, cannot express "
        f"{'; '.join(lacks[nearest][:4])} (known: {', '.join(names())})"
    )


def _lookup(name: str, where: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise InteropError(f"{where}: {unknown('architecture', name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
