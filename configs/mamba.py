"""Mamba: `--config=configs/mamba.py[:130m|370m|790m|1.4b|2.8b]`."""

from effjax.training import config as configs


def stack(d_model, num_layers, mixers):
    """One line of the paper's table of shapes (arXiv 2312.00752, table 12; 2405.21060 keeps them)."""
    return {
        "vocab_size": 50_280,
        "d_model": d_model,
        "num_layers": num_layers,
        "mixers": mixers,
        "dtype": "bfloat16",
        "remat": "dots",
        "scan_layers": True,
    }


SHAPES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
SIZES = {size: stack(*shape, ({"name": "mamba"},)) for size, shape in SHAPES.items()}


def get_config(size=None):
    return configs.of_size("mamba", size, SIZES)
