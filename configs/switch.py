"""Switch Transformer: `--config=configs/switch.py[:base|large]`."""

from effjax.training import config as configs


def switch(d_model, num_layers, num_heads, hidden_dim):
    """Model fields of a Switch Transformer as a decoder; 128 experts with ReLU as there."""
    return {
        "vocab_size": 32_128,
        "d_model": d_model,
        "num_layers": num_layers,
        "mixers": ({"name": "attention", "num_heads": num_heads, "head_dim": 64},),
        "ffn": {
            "num_experts": 128,
            "hidden_dim": hidden_dim,
            "gated": False,
            "activation": "relu",
        },
        "dtype": "bfloat16",
        "remat": "dots",
        "scan_layers": True,
    }


# arXiv 2101.03961, table 9.
SIZES = {"base": switch(768, 12, 12, 3072), "large": switch(1024, 24, 16, 4096)}


def get_config(size=None):
    config = configs.of_size("switch", size, SIZES)
    if size:
        config.mesh.expert = 8
    return config
