"""(docstring, code) pairs of the standard library."""

import ast
import collections
import importlib
import inspect
import itertools
import re
import textwrap

import numpy as np

from effjax import data
from effjax.data.sources import Pair, StandardLibrary, StandardLibraryPairs
from effjax.data.sources.stdlib import library_files
from effjax.data.sources.stdlib_pairs import library_pairs, pairs_in

SOURCE = b'''
class Outer:
    "A class of which there is one here."
    field = 1  # said once

    def method(self):
        """First line.

            Indented more.
        """
        # a comment before the code
        if self.field:
            def inner():
                """An inner function with its own words."""
                return 1
        return inner

def undocumented(): return 1
def only_documented():
    """There is nothing but this."""
def one_line(): "docstring and code on one line"; return 1
try:
    async def guarded():
        r"""A function \\w inside a block."""
        await None
except Exception:
    pass
'''


def test_pairs_of_a_file():
    assert [(p.name, p.query, p.document) for p in pairs_in("x.py", SOURCE)] == [
        (
            "Outer",
            "A class of which there is one here.",
            textwrap.dedent(SOURCE.decode().split("here.\"\n")[1].split("\n\ndef undoc")[0]),
        ),
        (
            "Outer.method",
            "First line.\n\nIndented more.",
            "# a comment before the code\nif self.field:\n    def inner():\n"
            '        """An inner function with its own words."""\n        return 1\nreturn inner',
        ),
        ("Outer.method.inner", "An inner function with its own words.", "return 1"),
        ("guarded", "A function \\w inside a block.", "await None"),
    ]  # fmt: skip


def normalised(node):
    """A syntax tree as text, white space in string constants (inner docstrings) aside."""
    return re.sub(r"(\s|\\n)+", " ", ast.dump(node))


def test_pairs_agree_with_inspect():
    modules = ("textwrap", "heapq", "statistics", "fractions", "difflib", "shutil", "string")
    definitions = collections.Counter((pair.file, pair.name) for pair in library_pairs())
    compared = 0
    for pair in library_pairs():
        module = pair.file.removesuffix(".py")
        if module not in modules or definitions[pair.file, pair.name] > 1:
            continue  # one name may be defined once for each platform
        found = importlib.import_module(module)
        for part in pair.name.split("."):
            found = inspect.getattr_static(found, part, None)
        found = getattr(found, "fget", found)
        if not inspect.isfunction(found) or inspect.unwrap(found) is not found:
            continue
        assert pair.query == inspect.cleandoc(found.__doc__)
        (whole,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body
        body = ast.parse("async def f():\n" + textwrap.indent(pair.document, " ")).body[0].body
        assert list(map(normalised, body)) == list(map(normalised, whole.body[1:]))
        compared += 1
    assert compared > 100


def test_no_pair_twice_and_no_text_on_both_sides():
    source = StandardLibraryPairs()
    train, heldout = source.pairs("train"), source.pairs("heldout")
    assert len(train) > 3000
    assert 100 < len(heldout) < len(train) / 4
    for side in ("query", "document"):
        texts = [" ".join(getattr(pair, side).split()) for pair in train + heldout]
        assert len(texts) == len(set(texts))
    assert min(len(pair.query.split()) for pair in train + heldout) >= 4
    assert {pair.file for pair in train}.isdisjoint(pair.file for pair in heldout)
    heldout_texts = set(StandardLibrary().documents("heldout"))
    assert all(library_files()[pair.file].read_bytes() in heldout_texts for pair in heldout)


def config(**changes):
    return {"source": "stdlib_pairs", "seq_len": 48, "batch_size": 8, **changes}


def decoded(batch, side):
    tokens, segments = batch[f"{side}_tokens"], batch[f"{side}_segment_ids"]
    return [bytes(row[mask > 0].astype(np.uint8)) for row, mask in zip(tokens, segments)]  # noqa: B905


def test_batches_hold_truncated_padded_pairs():
    known = {
        (pair.query.encode()[:48], pair.document.encode()[:48])
        for pair in StandardLibraryPairs().pairs("train")
    }
    for batch in itertools.islice(data.build(config(), split="train"), 20):
        assert {field: (a.shape, a.dtype) for field, a in batch.items()} == {
            f"{side}_{what}": ((8, 48), np.int32)
            for side in ("query", "document")
            for what in ("tokens", "segment_ids")
        }
        texts = zip(decoded(batch, "query"), decoded(batch, "document"), strict=True)
        assert known.issuperset(texts)
        for side in ("query", "document"):
            segments = batch[f"{side}_segment_ids"]
            assert (np.diff(segments, axis=1) <= 0).all()  # text first, then padding
            assert (batch[f"{side}_tokens"][segments == 0] == 256).all()


def test_training_pairs_are_shuffled_resumable_and_shared_out():
    iterator = data.build(config(seed=1), split="train")
    other = next(data.build(config(seed=2), split="train"))
    first = next(iterator)
    assert decoded(first, "query") != decoded(other, "query")
    resumed = data.build(config(seed=1), split="train")
    resumed.set_state(iterator.get_state())
    for _ in range(3):
        assert decoded(next(resumed), "query") == decoded(next(iterator), "query")
    pairs, seen = StandardLibraryPairs().pairs("train"), []
    for rows in np.array_split(np.arange(len(pairs)), 3):
        batches = data.build(config(batch_size=len(pairs)), split="train", rows=rows.tolist())
        seen += decoded(next(batches), "document")  # one epoch
    assert sorted(seen) == sorted(pair.document.encode()[:48] for pair in pairs)


def test_heldout_pairs_come_once():
    pairs = StandardLibraryPairs().pairs("heldout")
    batches = list(data.build(config(batch_size=7), split="heldout"))
    texts = [text for batch in batches for text in decoded(batch, "document")]
    filler = -len(pairs) % 7
    assert sorted(texts) == sorted([b""] * filler + [pair.document.encode()[:48] for pair in pairs])
    last = batches[-1]["query_tokens"][7 - filler :]
    assert (last == 256).all()


def test_pairs_as_documents():
    pairs = StandardLibraryPairs().pairs("heldout")
    texts = list(data.documents({"source": "stdlib_pairs"}, split="heldout"))
    assert len(texts) == len(pairs)
    assert isinstance(pairs[0], Pair)
    assert texts[0] == f"{pairs[0].query}\n{pairs[0].document}".encode()
