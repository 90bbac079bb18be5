"""Recursive transformer, shared blocks without routing: `--config=configs/recursive.py[:135m|360m|730m|1.7b]`."""

from configs.mor import SIZES
from effjax.training import config as configs


def get_config(size=None):
    return configs.of_size("recursive", size, SIZES)
