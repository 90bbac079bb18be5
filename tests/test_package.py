"""`import effjax` is enough and takes no time, and its types are checked."""

import subprocess
import sys
from pathlib import Path

import pytest

import effjax

ROOT = Path(__file__).parents[1]

PROGRAM = """
import sys, effjax
assert "jax" not in sys.modules, "rooms are imported when they are asked for"
assert effjax.catalog.entries(family="depth")[0].id == "mor"
assert "jax" not in sys.modules, "the catalogue is text"
assert {"catalog", "models", "serving"} <= set(dir(effjax))
try:
    effjax.cheeses
except AttributeError as error:
    assert "cheeses" in str(error)
else:
    raise AssertionError("there is no such room")
"""

# What takes long to import and is for other devices, for the end of a run or for servers.
LATE = "jax.experimental.pallas", "matplotlib", "tensorboardX", "datasets", "torch", "fastapi"
TRAINING = f"""
import sys
from effjax.training import fit
import effjax.serving
assert not set(sys.modules).intersection({LATE}), set(sys.modules).intersection({LATE})
"""


def test_training_and_serving_import_no_more_than_they_begin_with():
    subprocess.run([sys.executable, "-c", TRAINING], check=True)


def test_rooms_are_imported_when_they_are_asked_for():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_every_room_can_be_asked_for():
    for room in effjax._ROOMS:
        assert getattr(effjax, room).__name__ == f"effjax.{room}"


@pytest.mark.slow
def test_the_types_of_what_users_import_are_right():
    checked = subprocess.run(
        [sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
