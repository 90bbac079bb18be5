"""What the README shows works as it stands there."""

import re

import jax
import pytest
from documents import ROOT, blocks, model_of, train_commands

README = ROOT / "README.md"
COMMANDS = train_commands(README)


def test_the_first_command_is_among_them():
    assert "train.py --config=configs/mor.py" in COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_describes_a_model(command):
    model = model_of(command)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 16), "int32"))
    assert shapes["params"]


def test_the_library_example_runs():
    (example,) = blocks(README, "python")
    names = {}
    exec(example, names)
    assert names["out"].logits.shape == (1, 256, names["model"].vocab_size)
    assert names["out"].aux and names["out"].metrics


def test_what_it_refers_to_is_there():
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", README.read_text("utf-8"))
    assert ("docs/results/recursions.png", "") in targets
    for path, section in targets:
        page = ROOT / path if path else README
        assert page.exists(), path
        assert not section or section in sections(page), f"{path}#{section}"


def sections(page):
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
