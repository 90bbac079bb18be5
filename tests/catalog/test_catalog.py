"""Entries of the catalogue name what exists, and the pages made of them are those that are checked in."""

import dataclasses
import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from evidence import ROOT, problems, sections_of
from rich.console import Console

from effjax import catalog
from effjax.catalog import pages
from effjax.catalog.entry import parse
from effjax.catalog.table import table

ENTRIES = catalog.entries()
BY_ID = {entry.id: entry for entry in ENTRIES}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)  # configs are paths


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
def test_what_an_entry_names_exists(entry):
    assert list(problems(entry)) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("symbols", ("effjax.depth.MixtureOfIncursions",)),
        ("symbols", ("effjax.dept.Recursive",)),
        ("tests", ("tests/depth/test_nothing.py",)),
        ("tests", ("tests/depth/test_sharing.py::test_nothing",)),
        ("tests", ("tests/catalog/evidence.py",)),
        ("configs", ("configs/mor.py:361m",)),
        ("configs", ("configs/mor.py --config.model.depht=plain",)),
        ("configs", ("configs/compose.py:optimizer=lyon",)),
        ("benchmarks", ("benchmarks.nothing",)),
        ("result", "docs/NOTHING.md"),
        ("result", "README.md#no-such-section"),
    ],
)
def test_what_does_not_exist_is_noticed(field, value):
    entry = dataclasses.replace(BY_ID["mor"], **{"configs": (), field: value})
    (problem,) = problems(entry)
    assert problem.startswith(f"{field}: ")


def test_a_result_may_be_a_section():
    entry = dataclasses.replace(BY_ID["mor"], configs=(), result="README.md#train-one-now")
    assert list(problems(entry)) == []
    assert entry.claim == "README.md#train-one-now"
    assert "[result](../RELIABILITY.md)" in pages.page(
        dataclasses.replace(entry, result="docs/RELIABILITY.md")
    )


def test_sizes_of_a_recipe_are_all_there():
    for entry in ENTRIES:
        named = [config for config in entry.configs if " " not in config]
        for recipe in {re.split("[.:/]", config)[1] for config in named}:
            sizes = getattr(importlib.import_module(f"configs.{recipe}"), "SIZES", None)
            if sizes is not None:
                path = f"configs/{recipe}.py"
                assert named == [path, *(f"{path}:{size}" for size in sizes)], entry.id


def test_claims_that_were_measured_are_linked():
    """Else: `result = "docs/RESULTS.md#<id>"` in the entry's file, then `python -m effjax.catalog --write=.`."""
    sections = sections_of("docs/RESULTS.md")
    linked = {entry.id for entry in ENTRIES if entry.result == f"docs/RESULTS.md#{entry.id}"}
    assert linked == {entry.id for entry in ENTRIES if entry.id in sections}


def test_pages_are_not_stale():
    stale = [str(p) for p, text in pages.pages(ROOT).items() if not _reads(p, text)]
    assert not stale + pages.stray(ROOT), "run: python -m effjax.catalog --write=."


def _reads(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


def test_pages_are_written_and_those_without_an_entry_taken_away(tmp_path):
    with pytest.raises(ValueError, match="no lines"):
        pages.write(tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    gone = tmp_path / pages.METHODS / "gone.md"
    gone.parent.mkdir(parents=True)
    gone.write_text("a method of the past")
    assert gone not in pages.write(tmp_path)
    assert not gone.exists()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "Mixture-of-Recursions" in readme
    assert "old" not in readme.split()
    assert (tmp_path / "docs/methods/mor.md").read_text() == pages.page(BY_ID["mor"])


def test_families():
    assert {entry.family for entry in ENTRIES} == set(catalog.families())
    assert [entry.id for entry in catalog.entries("depth")] == ["mor"]
    with pytest.raises(ValueError, match="unknown family 'moo'; did you mean 'moe'"):
        catalog.entries(family="moo")


def test_the_table_says_what_is_not_measured():
    measured = dataclasses.replace(BY_ID["mor"], result="docs/RESULTS.md#mor")
    console = Console(width=200, file=io.StringIO())
    console.print(table([measured, BY_ID["lion"]]))
    printed = console.file.getvalue()
    assert "docs/RESULTS.md#mor" in printed
    assert "effjax.depth.MixtureOfRecursions" in printed
    assert ("not measured yet" in printed) == (BY_ID["lion"].result is None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbol": "x"}, "m: unknown field 'symbol'; valid: name, title"),
        ({"paper": ""}, "m: missing field 'paper'"),
        ({"tests": "tests/x.py"}, r"m: tests is 'tests/x.py'; valid: a list of strings"),
        ({"name": 7}, "m: name is 7; valid: a string"),
    ],
)
def test_wrong_fields_are_named(change, message):
    entry = dataclasses.asdict(BY_ID["lion"])
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in entry.items() if v is not None}
    del fields["id"]
    assert parse("lion", fields) == BY_ID["lion"]
    with pytest.raises(ValueError, match=message):
        parse("m", fields | change)


def test_the_command_ends_with_one_message():
    command = [sys.executable, "-m", "effjax.catalog", "--family=moo"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: catalog: unknown family 'moo'; did you mean 'moe'?")
