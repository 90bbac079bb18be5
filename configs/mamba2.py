"""Mamba-2: `--config=configs/mamba2.py[:130m|370m|780m|1.3b|2.7b]`."""

from configs.mamba import SHAPES, stack
from effjax.training import config as configs

_NAMES = ("130m", "370m", "780m", "1.3b", "2.7b")
_MIXER = {"name": "mamba2", "head_dim": 64, "state_dim": 128}
SIZES = {
    name: stack(*shape, (_MIXER,)) for name, shape in zip(_NAMES, SHAPES.values(), strict=True)
}


def get_config(size=None):
    return configs.of_size("mamba2", size, SIZES)
