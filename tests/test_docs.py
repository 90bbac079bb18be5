"""Pages of the documentation: their code runs, their commands are valid, and what they refer to is there."""

import importlib
import inspect
import os
import posixpath
import re
import subprocess
import sys

import pytest
from documents import ROOT, blocks, model_of, train_commands

from effjax import registry
from effjax.catalog.entry import resolve

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Those of methods show what the catalogue says, which has tests of its own.
WRITTEN = [page for page in PAGES if page.parent.name != "methods"]
COMMANDS = sorted({command for page in WRITTEN for command in train_commands(page)})
WITH_CODE = [page for page in WRITTEN if blocks(page, "python")]
SLOW = ("library.md",)  # which trains


def name(page):
    return str(page.relative_to(DOCS))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_describes_a_model(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert model_of(command).num_layers


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page.name in SLOW else [], id=name(page))
        for page in WITH_CODE
    ],
)
def test_code_runs(page, monkeypatch):
    for kind, parts in registry._PARTS.items():  # what a page registers is gone after it
        monkeypatch.setitem(registry._PARTS, kind, dict(parts))
    exec("\n".join(blocks(page, "python")), {})


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_page_refers_to_is_there(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).resolve().exists(), target
    for symbol in re.findall(r"^::: (\S+)$", text, re.MULTILINE):
        assert _found(symbol), symbol


def _found(symbol):
    try:
        return importlib.import_module(symbol)
    except ModuleNotFoundError:
        return resolve(symbol)


def test_every_page_can_be_reached():
    nav = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    methods = re.findall(r"\]\(([\w-]+\.md)\)", (DOCS / "methods/index.md").read_text("utf-8"))
    reached = {*nav, *(posixpath.join("methods", page) for page in methods)}
    assert reached == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_the_site_is_built_and_its_reference_is_whole(tmp_path):
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(build, cwd=ROOT, env=environment, check=True)
    for page in (DOCS / "reference").glob("*.md"):
        built = (tmp_path / "reference" / page.stem / "index.html").read_text("utf-8")
        anchors = re.findall(r'id="([^"]+)"', built)
        shown = {anchor.rpartition(".")[2] for anchor in anchors}
        for symbol in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE):
            assert _documented(_found(symbol)) <= shown, page.name


def _documented(found):
    """The classes and functions of ours among the public names of a package."""
    public = {name: getattr(found, name) for name in getattr(found, "__all__", ())}
    parts = {n: x for n, x in public.items() if inspect.isclass(x) or inspect.isfunction(x)}
    return {n for n, x in parts.items() if x.__module__.startswith(("effjax", "pallas_kernels"))}
