"""A trained model's own words: the continuation of a prompt, as it is drawn."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import data
from effjax.evaluation.run import restore
from effjax.serving import Sampling, stream, text_pieces
from effjax.serving.sampling import PLAIN


def continue_text(
    config: Mapping[str, Any] | None,
    workdir: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    sampling: Sampling = PLAIN,
    seed: int = 0,
) -> Iterator[str]:
    """The text that a run's model puts after a prompt, in pieces as they come.

    The prompt is read as the beginning of a document, and the text ends where the model ends the document.

    Args:
      config: see `evaluation.evaluate`.
      workdir: of the run.
      prompt: text; empty for the beginning of a document.
      max_new_tokens: most tokens of the continuation.
      sampling: how they are drawn.
      seed: of the draws.

    Raises:
      CheckpointError: if the workdir has no config or no checkpoint that can be read.
      ValueError: for a model that cannot generate, or a prompt too long for it.
    """
    run = restore(config, workdir)
    tokenizer = data.tokenizer(run.config["data"])
    end = tokenizer.eos_id
    start = end if tokenizer.bos_id is None else tokenizer.bos_id  # as documents are packed
    ids = np.concatenate([[] if start is None else [start], tokenizer.encode(prompt)]).astype(
        np.int32
    )
    steps = stream(
        run.model,
        run.variables,
        [ids],
        max_new_tokens,
        sampling=sampling,
        stop_tokens=() if end is None else (end,),
        key=jax.random.key(seed),
    )
    return text_pieces(tokenizer, (int(step.tokens[0]) for step in steps), shown=ids)
