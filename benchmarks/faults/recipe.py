"""The run that is hurt: a small Mixture-of-Recursions; `--config=benchmarks/faults/recipe.py:<folder of text>`."""

import benchmarks.faults.faulty  # noqa: F401 (registers its parts)
from benchmarks.faults import CHECKPOINT_EVERY, NUM_STEPS
from effjax.training import config as configs


def get_config(text):
    config = configs.default(
        "mor",
        d_model=32,
        num_layers=2,
        max_seq_len=32,
        **{"depth.num_recursions": 2, "depth.sharing": "cycle"},
    )
    source = {"paths": f"{text}/*.txt", "heldout_fraction": 0.2}
    config.data.source = configs.part_config("source", "faulty_text", **source)
    config.data.update(seq_len=32, batch_size=8, shards=8, shuffle_window=128)
    config.data.update(retries=3, retry_seconds=0.02)
    config.objective = configs.part_config("objective", "faulty_next_token")
    config.training.update(num_steps=NUM_STEPS, log_every=1, eval_every=40, eval_batches=2)
    config.training.update(checkpoint_every=CHECKPOINT_EVERY, keep=3, keep_best=False)
    config.training.update(ema_decay=0.9)
    config.mesh.data = -1
    config.evaluation.update(num_batches=2, latency_runs=1)
    return config
