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


# Bytes say little one by one: a short convolution before the attention lets a few hundred steps learn names from them.
TINY = {
    "num_layers": 2,
    "mixers": (
        {"name": "short_conv", "expansion": 1},
        {"name": "attention", "num_heads": 4, "causal": False},
    ),
}


def get_config(size=None):
    config = configs.of_size("matryoshka", size, SIZES) if size else tiny()
    config.data.source = configs.part_config("source", "stdlib_pairs")
    config.objective = configs.part_config(
        "objective", "contrastive", temperature=0.07, matryoshka_dims=DIMS[size]
    )
    if size:
        config.data.seq_len = 512
    return config


def tiny():
    config = configs.default("matryoshka", **TINY)
    config.data.seq_len = 128
    config.data.batch_size = 64  # the others of a batch are the wrong answers
    config.optimizer.schedule.peak = 4e-3
    config.training.num_steps = 200
    return config
