"""What documentation and README say of the catalogue, in Markdown: `docs/methods/` and the README's table of methods.

A page shows the docstrings of its symbols where mkdocstrings finds a line that begins with `:::`.
"""

import itertools
import posixpath
from collections.abc import Sequence
from pathlib import Path

from effjax.catalog.entry import Entry, resolve
from effjax.catalog.reading import entries

METHODS = Path("docs", "methods")
README = Path("README.md")
BEGIN = "<!-- methods: written by `python -m effjax.catalog --write=.` -->"
END = "<!-- end of methods -->"
# What of a symbol's module is ours to document.
_OURS = ("effjax", "pallas_kernels")


def write(root: str | Path) -> list[Path]:
    """Writes every page, takes away those whose entry is gone, and returns the paths that were written.

    Raises:
      ValueError: if there is no README with the markers of the table at `root`.
    """
    root = Path(root)
    written = pages(root)
    for path in stray(root):
        path.unlink()
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return list(written)


def pages(root: Path) -> dict[Path, str]:
    """The text of every file that depends on the catalogue, by its path."""
    own = {root / METHODS / f"{entry.id}.md": page(entry) for entry in entries()}
    return own | {root / METHODS / "index.md": index(), root / README: readme(root / README)}


def stray(root: Path) -> list[Path]:
    """Pages in the folder of methods of which there is no entry."""
    names = {"index.md", *(f"{entry.id}.md" for entry in entries())}
    return sorted(path for path in (root / METHODS).glob("*.md") if path.name not in names)


def page(entry: Entry) -> str:
    """The page of one method."""
    facts = [("paper", f"[{entry.title}]({entry.paper})"), ("family", entry.family)]
    if entry.code:
        facts.insert(1, ("authors' code", f"[{entry.code}](https://github.com/{entry.code})"))
    facts.append(("headline claim", _claim(entry, METHODS)))
    sections = [
        f"# {entry.name}",
        entry.summary,
        "\n".join(("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts))),
        *_training(entry),
        "## In code",
        *(_symbol(symbol) for symbol in entry.symbols),
        "## What shows that it works",
        "\n".join(f"- `{test}`" for test in entry.tests),
    ]
    if entry.benchmarks:
        commands = "\n".join(f"uv run --extra test python -m {name}" for name in entry.benchmarks)
        sections += ["What it costs is measured by", f"```bash\n{commands}\n```"]
    return "\n\n".join(sections) + "\n"


def index() -> str:
    """All methods, a table a family."""
    sections = [
        "# Methods",
        "Every paper that is a part of effjax: what it is here, a recipe that trains it, and whether its headline claim"
        " was measured. `python -m effjax.catalog` prints the same.",
    ]
    for family, members in itertools.groupby(entries(), lambda entry: entry.family):
        rows = (
            f"| [{e.name}]({e.id}.md) | {e.summary} | {_recipe(e)} | {_claim(e, METHODS)} |"
            for e in members
        )
        header = ("| method | what it does | recipe | headline claim |", "|---|---|---|---|")
        sections += [f"## {family}", "\n".join((*header, *rows))]
    return "\n\n".join(sections) + "\n"


def readme(path: Path) -> str:
    """The README at `path` with its table of methods written anew.

    Raises:
      ValueError: if it has no markers.
    """
    text = path.read_text("utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"catalog: {path} has no lines {BEGIN} and {END}; valid: a checkout's")
    return f"{before}{BEGIN}\n{_readme_table(entries())}\n{END}{after}"


def _readme_table(shown: Sequence[Entry]) -> str:
    header = ("| method | in the library | recipe | headline claim |", "|---|---|---|---|")
    rows = (
        f"| [{e.name}]({e.paper}) | `{e.symbols[0]}` | {_recipe(e)} | {_claim(e, README.parent)} |"
        for e in shown
    )
    return "\n".join((*header, *rows))


def _recipe(entry: Entry) -> str:
    """The first config, and the names of the sizes that it has besides."""
    if not entry.configs:
        return "one call"
    first = entry.configs[0]
    sizes = [c.removeprefix(f"{first}:") for c in entry.configs if c.startswith(f"{first}:")]
    return f"`{first}`" + (f": tiny, {', '.join(sizes)}" if sizes else "")


def _training(entry: Entry) -> list[str]:
    if not entry.configs:
        return []
    commands = "\n".join(f"uv run train.py --config={config}" for config in entry.configs)
    return ["## Train it", f"```bash\n{commands}\n```"]


def _symbol(symbol: str) -> str:
    """A place for the docstring of a symbol of ours, from where it is defined; the name of one of other libraries."""
    found = resolve(symbol)
    if found.__module__.partition(".")[0] not in _OURS:
        return f"`{symbol}`, which is {symbol.partition('.')[0]}'s."
    options = "    options:\n      heading_level: 3\n      heading: " + symbol
    return f"::: {found.__module__}.{found.__qualname__}\n{options}"


def _claim(entry: Entry, folder: Path) -> str:
    """What became of the claim, with a link from a page in `folder`, whose site has the files of `docs` only."""
    if entry.result is None:
        return entry.claim
    if folder == METHODS and not entry.result.startswith("docs/"):
        return f"`{entry.result}`"
    return f"[result]({posixpath.relpath(entry.result, folder.as_posix())})"
