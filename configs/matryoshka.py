"""Matryoshka text embedder, trained on (docstring, code) pairs: `--config=configs/matryoshka.py[:bert-base]`."""

from effjax.training import config as configs

SIZES = {
    "bert-base": {
        "vocab_size": 30_522,
        "d_model": 768,
        "num_layers": 12,
        "mixers": ({"name": "attention", "num_heads": 12, "causal": False},),
        "ffn": {"hidden_dim": 2048},
        "dtype": "bfloat16",
        "scan_layers": True,
    }
}

# Nested dimensions; for BERT-Base those of the paper (arXiv 2205.13147, section 4.1).
DIMS = {None: (8, 16, 32, 64, 128), "bert-base": (12, 24, 48, 96, 192, 384, 768)}


def get_config(size=None):
    config = configs.of_size("matryoshka", size, SIZES)
    config.data.source = configs.part_config("source", "stdlib_pairs")
    config.objective = configs.part_config("objective", "contrastive", matryoshka_dims=DIMS[size])
    if size:
        config.data.seq_len = 512
    return config
