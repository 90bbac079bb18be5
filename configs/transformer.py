"""Llama-style transformer, the baseline of every claim: `--config=configs/transformer.py[:135m|360m|730m|1.7b]`."""

from effjax.training import config as configs


def llama(d_model, num_layers, num_heads, num_kv_heads, hidden_dim):
    """Model fields of a Llama shape with the vocabulary of SmolLM."""
    return {
        "vocab_size": 49_152,
        "d_model": d_model,
        "num_layers": num_layers,
        "mixers": ({"name": "attention", "num_heads": num_heads, "num_kv_heads": num_kv_heads},),
        "ffn": {"hidden_dim": hidden_dim},
        "dtype": "bfloat16",
        "remat": "dots",
        "scan_layers": True,
    }


# SmolLM's shapes, the family within which the Mixture-of-Recursions paper compares (arXiv 2507.10524, table 1). The
# largest has 16 heads of 128 where that has 32 of 64: as many parameters and products, and the lanes of a TPU are 128.
SIZES = {
    "135m": llama(576, 30, 9, 3, 1536),
    "360m": llama(960, 32, 15, 5, 2560),
    "730m": llama(1536, 26, 24, 8, 4096),
    "1.7b": llama(2048, 24, 16, 16, 8192),
}


def get_config(size=None):
    return configs.of_size("transformer", size, SIZES)
