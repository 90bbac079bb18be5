"""Training that starts from a Hugging Face folder: `--config=configs/uptrain.py:recursive:path/to/folder`.

Before the path stands what becomes of the model in the folder, named by a model of the zoo that has the depth policy
and the feed-forward that it is to get:

    transformer        what it is: all parameters are trained on
    recursive, mor     layers tied into recursions (config.init_from.initialisation says how)
    switch, adamoe     a mixture of experts that are copies of the feed-forward

Further fields go on the command line: --config.model.depth.num_recursions=2 --config.model.ffn.num_experts=4. The text
is read with the tokenizer of the folder; one without a tokenizer.json reads bytes.
"""

from pathlib import Path

from effjax import interop, models, registry
from effjax.ffn.mixture import MixtureOfExperts
from effjax.models.uptraining import uptrained_model
from effjax.training import config as configs

TARGETS = ("transformer", "recursive", "mor", "switch", "adamoe")


def get_config(argument=None):
    target, _, path = (argument or "").partition(":")
    if target not in TARGETS or not path:
        raise ValueError(
            f"config: {argument!r}; valid: one of {', '.join(TARGETS)}, then :path/to/folder"
        )
    preset = models.create(target)
    is_mixture = isinstance(preset.ffn, MixtureOfExperts)
    model = uptrained_model(
        interop.read_model(path), depth=preset.depth, ffn=preset.ffn if is_mixture else None
    )
    config = configs.default(target, **registry.describe_fields(model))
    config.init_from.path = path
    tokenizer = Path(path) / "tokenizer.json"
    if tokenizer.is_file():
        config.data.tokenizer = configs.part_config("tokenizer", "huggingface", path=str(tokenizer))
    # A tenth of what a model that knows nothing takes: it has much to forget.
    config.optimizer.schedule.peak /= 10
    return config
