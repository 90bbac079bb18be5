"""Llama-style transformer, the baseline of every claim: `--config=configs/transformer.py[:135m|360m|730m|1.7b]`."""

from effjax.training import config as configs

# SmolLM's shapes, the family that the Mixture-of-Recursions paper compares within (arXiv 2507.10524, table 1).
SIZES = {
    "135m": {"d_model": 576, "num_layers": 30, "heads": (9, 3), "hidden_dim": 1536},
    "360m": {"d_model": 960, "num_layers": 32, "heads": (15, 5), "hidden_dim": 2560},
    "730m": {"d_model": 1536, "num_layers": 26, "heads": (24, 8), "hidden_dim": 4096},
    "1.7b": {"d_model": 2048, "num_layers": 24, "heads": (32, 32), "hidden_dim": 8192},
}


def llama_fields(d_model, num_layers, heads, hidden_dim):
    """Model fields of a SmolLM shape; the vocabulary is that of its tokenizer."""
    num_heads, num_kv_heads = heads
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


def get_config(size=None):
    fields = configs.of_size(size, SIZES)
    config = configs.default("transformer", **(llama_fields(**fields) if fields else {}))
    if size:
        configs.at_scale(config)
    return config
