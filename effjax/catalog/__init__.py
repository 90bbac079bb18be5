"""The catalogue: which paper is which part of this library, and what shows that it works.

for entry in effjax.catalog.entries(family="moe"):
    print(entry.name, entry.symbols, entry.configs, entry.claim)

`python -m effjax.catalog [--family=moe]` prints it as a table. An entry is a file of `papers/`. A method is there if it
can be reached from a config or in one call, a test holds its defining equations against an independent reference, and
its docstring teaches it. Whether the headline claim of its paper was measured here, `claim` says.
"""

from effjax.catalog.entry import Entry
from effjax.catalog.reading import entries, families

__all__ = ["Entry", "entries", "families"]
