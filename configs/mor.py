"""Mixture-of-Recursions: `--config=configs/mor.py[:135m|360m|730m|1.7b]`."""

from configs.transformer import llama
from effjax.training import config as configs

# The transformer's shapes as middle cycles of three recursions (arXiv 2507.10524, table 1); where the layers between
# the first and the last do not divide by three, there are as many as do.
SIZES = {
    "135m": llama(576, 29, 9, 3, 1536),
    "360m": llama(960, 32, 15, 5, 2560),
    "730m": llama(1536, 26, 24, 8, 4096),
    "1.7b": llama(2048, 23, 16, 16, 8192),
}


def get_config(size=None):
    return configs.of_size("mor", size, SIZES)
