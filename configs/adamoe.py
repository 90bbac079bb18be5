"""AdaMoE, mixture of experts with null experts: `--config=configs/adamoe.py[:mixtral-8x7b]`."""

from effjax.training import config as configs

# Mixtral-8x7B (arXiv 2401.04088, table 1), the model that the paper turns into an AdaMoE (arXiv 2406.13233, section 4).
SIZES = {
    "mixtral-8x7b": {
        "vocab_size": 32_000,
        "d_model": 4096,
        "num_layers": 32,
        "mixers": (
            {"name": "attention", "num_heads": 32, "num_kv_heads": 8, "rope_base": 1_000_000.0},
        ),
        "ffn": {"num_experts": 8, "hidden_dim": 14_336},
        "head": "untied",
        "dtype": "bfloat16",
        "remat": "full",
        "scan_layers": True,
    }
}


def get_config(size=None):
    config = configs.of_size("adamoe", size, SIZES)
    if size:
        config.mesh.expert = 8
    return config
