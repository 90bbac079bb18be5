"""The default pairs: the docstring and the code of every documented function and class of the
standard library.

Finding the code that a sentence describes is a real retrieval task, and it exists on every machine.
"""

import ast
import dataclasses
import functools
import io
import textwrap
import tokenize
import warnings
from collections.abc import Iterator

from effjax.data.sources.stdlib import library_files
from effjax.data.splits import check_fraction, in_split
from effjax.registry import register

MIN_DOCSTRING_WORDS = 4
MIN_CODE_BYTES = 24

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Pair:
    """A docstring and the code it documents.

    Attributes:
      file: path below the standard library.
      name: qualified name of the function or class in its file.
      query: the docstring, indentation removed.
      document: the body without the docstring and without the line that has the name, indentation
        removed.
    """

    file: str
    name: str
    query: str
    document: str


@register("source", "stdlib_pairs")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardLibraryPairs:
    """(docstring, code) pairs of the standard library; see `library_pairs` for which are kept.

    Attributes:
      heldout_fraction: share of the files whose pairs are held out: the same files as source
        `stdlib` holds out.
    """

    heldout_fraction: float = 0.1

    def __post_init__(self):
        check_fraction("source 'stdlib_pairs'", self.heldout_fraction)

    def pairs(self, split: str) -> list[Pair]:
        """The pairs of one split, in the order of file names and lines."""
        return [p for p in library_pairs() if in_split(p.file, split, self.heldout_fraction)]


@functools.cache
def library_pairs() -> tuple[Pair, ...]:
    """All pairs worth learning from, in the order of file names and lines. Parses the library: a
    few seconds, once.

    Left out are docstrings of fewer than `MIN_DOCSTRING_WORDS` words and bodies of fewer than
    `MIN_CODE_BYTES` bytes ("See base class.", `pass`). A docstring or a body that occurs more than
    once keeps its first pair only, so that each query has one right answer and no held-out text is
    in the training split.
    """
    kept, queries, documents = [], set(), set()
    for file, path in library_files().items():
        for pair in pairs_in(file, path.read_bytes()):
            query, document = " ".join(pair.query.lower().split()), " ".join(pair.document.split())
            trivial = len(query.split()) < MIN_DOCSTRING_WORDS or len(document) < MIN_CODE_BYTES
            if not trivial and query not in queries and document not in documents:
                kept.append(pair)
                queries.add(query)
                documents.add(document)
    return tuple(kept)


def pairs_in(file: str, source: bytes) -> Iterator[Pair]:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    text = source.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in somebody else's strings
        tree = ast.parse(text)
    lines = text.split("\n")  # as ast counts them; str.splitlines would also split at form feeds
    for name, node in _definitions(tree.body, ()):
        query = ast.get_docstring(node)
        if query is None or len(node.body) < 2:
            continue
        docstring, first = node.body[:2]
        if first.lineno == docstring.end_lineno:
            continue  # `"doc"; code` on one line: no lines of its own
        document = textwrap.dedent("\n".join(lines[docstring.end_lineno : node.end_lineno])).strip(
            "\n"
        )
        yield Pair(file, ".".join(name), query, document)


def _definitions(
    body: list[ast.stmt], outer: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], _Definition]]:
    """Functions and classes among statements, nested ones included, with their qualified names.

    Visits statements only: walking the expressions too would take several times as long.
    """
    for node in body:
        inner = outer
        if isinstance(node, _Definition):
            inner = (*outer, node.name)
            yield inner, node
        for block in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(node, block, []), inner)
        for branch in (*getattr(node, "handlers", ()), *getattr(node, "cases", ())):
            yield from _definitions(branch.body, inner)
