"""BASED, linear attention and sliding windows: `--config=configs/based.py[:360m]`."""

from effjax.training import config as configs

# The authors' 360M model (arXiv 2402.18668, appendix; its layers are in `effjax.models.based`).
_CONV = {"name": "short_conv"}
_LINEAR = {"name": "taylor_linear", "num_heads": 16, "feature_dim": 16}
_WINDOW = {"name": "sliding_window", "num_heads": 16, "window": 65}

_HYBRID = (_CONV, _LINEAR, _WINDOW, _CONV, _CONV)

SIZES = {
    "360m": {
        "vocab_size": 50_304,
        "d_model": 1024,
        "num_layers": 27,
        "mixers": (*5 * _HYBRID, _CONV, _CONV),
        "ffn": {"hidden_dim": 2048},
        "dtype": "bfloat16",
        "remat": "dots",
    }
}


def get_config(size=None):
    return configs.of_size("based", size, SIZES)
