"""Prints the catalogue: `python -m effjax.catalog [--family=moe]`.

In a checkout, `python -m effjax.catalog --write=.` writes what the documentation and the README say of it anew.
"""

from absl import flags
from rich.console import Console

from effjax import cli
from effjax.catalog.pages import write
from effjax.catalog.reading import entries
from effjax.catalog.table import table

_FAMILY = flags.DEFINE_string("family", None, "Only the papers of this family.")
_WRITE = flags.DEFINE_string("write", None, "Root of a checkout whose pages are written anew.")


def main() -> None:
    if _WRITE.value is None:
        Console().print(table(entries(_FAMILY.value)))
    elif _FAMILY.value is not None:
        raise ValueError(f"--family={_FAMILY.value} with --write; valid: one of the two")
    else:
        for path in write(_WRITE.value):
            print(f"wrote {path}")


if __name__ == "__main__":
    cli.run(main)
