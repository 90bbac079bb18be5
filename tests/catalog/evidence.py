"""Looks for what an entry of the catalogue names: code by importing it, tests by parsing, configs by loading them."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from absl import flags

from effjax import cli, models, optim
from effjax.catalog import Entry
from effjax.catalog.entry import resolve
from effjax.training import config as configs

ROOT = Path(__file__).parents[2]
# What stands in configs for a Hugging Face folder of the reader's.
_FOLDER = ("path/to/folder", "tests/fixtures/hf/llama")


def problems(entry: Entry) -> Iterator[str]:
    """What an entry names and is not there, as `field: what`."""
    looks = {
        "symbols": _symbol,
        "tests": _test,
        "configs": _config,
        "benchmarks": _benchmark,
        "result": _result,
    }
    for field, look in looks.items():
        value = getattr(entry, field)
        for one in (value,) if isinstance(value, str) else value or ():
            try:
                look(one)
            except Exception as error:  # whatever goes wrong is what is wrong with the entry
                yield f"{field}: {one}: {error}"


def _symbol(symbol: str) -> None:
    if not resolve(symbol).__doc__:
        raise ValueError("no docstring")


def _test(name: str) -> None:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    if not any(one.startswith("test_") and function in ("", one) for one in found):
        raise ValueError("no such test")


def _config(config: str) -> None:
    argv = shlex.split(f"train.py --config={config.replace(*_FOLDER)}")
    values = flags.FlagValues()
    holder = cli.define_config("A config.", values, argv)
    values(argv)
    given = configs.resolve(holder.value)
    models.create(**given["model"])
    optim.build(given["optimizer"], num_steps=10)


def _benchmark(module: str) -> None:
    path = ROOT.joinpath(*module.split("."))
    if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
        raise ValueError("no such program")


def _result(result: str) -> None:
    path, _, section = result.partition("#")
    sections = sections_of(path)
    if section and section not in sections:
        raise ValueError(f"no section {section!r}; there are {', '.join(sections)}")


def sections_of(path: str) -> list[str]:
    """The anchors of a Markdown file: its headings as GitHub and mkdocs link to them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return [re.sub(r"[ ]+", "-", heading) for heading in plain]
