"""A run's model continues a prompt: `eval.py --prompt`."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from effjax import data, evaluation, models, run_config, serving
from effjax.checkpoint import Checkpoints
from effjax.data.tokenizers import ByteTokenizer
from effjax.serving import Sampling
from effjax.training.state import init_state

ROOT = Path(__file__).parents[2]
SOURCE = {"name": "text", "paths": [str(ROOT / "README.md")], "heldout_fraction": 0.0}


def save_run(workdir, name, **overrides):
    """A workdir as training leaves it, with random parameters; returns the model and its variables."""
    small = {"d_model": 16, "num_layers": 1, "ffn": {"hidden_dim": 16}, "max_seq_len": 64}
    config = {
        "model": models.spec(name, **small | overrides),
        "data": {"source": SOURCE, "seq_len": 32, "batch_size": 2, "shuffle_window": 1},
        "objective": {"name": "next_token"},
    }
    workdir.mkdir()
    run_config.save(workdir, config)
    model = models.create(**config["model"])
    state = jax.jit(
        functools.partial(init_state, model, optax.sgd(0.1), seq_len=32, seed=0, ema=False)
    )()
    batches = data.build(config["data"], split="train")
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(state.replace(step=np.int32(1)), batches, {})
    batches.close()
    return model, state.variables()


def command(*flags):
    return subprocess.run(
        [sys.executable, ROOT / "eval.py", *flags],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_the_command_prints_the_prompt_and_what_the_model_puts_after_it(tmp_path):
    model, variables = save_run(tmp_path / "run", "transformer")
    prompt = "naïve, "
    done = command(
        f"--workdir={tmp_path / 'run'}",
        f"--prompt={prompt}",
        "--max_new_tokens=20",
        "--temperature=0.7",
        "--top_k=50",
        "--seed=3",
    )
    assert done.returncode == 0, done.stderr.decode()
    tokenizer = ByteTokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    found = serving.generate(
        model,
        variables,
        [ids],
        20,
        sampling=Sampling(temperature=0.7, top_k=50),
        stop_tokens=(tokenizer.eos_id,),
        key=jax.random.key(3),
    )
    want = tokenizer.decode([*ids, *found.completions()[0]])
    assert done.stdout.decode().removesuffix("\n") == want


def test_an_embedder_has_nothing_to_say(tmp_path):
    save_run(tmp_path / "run", "transformer", head="embedding")
    with pytest.raises(ValueError, match="the head Embedding, which gives no logits"):
        list(evaluation.continue_text(None, tmp_path / "run", "text", 4))


@pytest.mark.slow
def test_flags_of_the_prompt_without_one_are_refused(tmp_path):
    done = command(f"--workdir={tmp_path}", "--temperature=1")
    assert done.returncode == 2
    assert done.stderr == b"error: --temperature without --prompt; valid: both, or neither\n"
