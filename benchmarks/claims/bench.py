"""Where the runs of the claims are: their text, their folders, and how long they last."""

import functools
import json
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from effjax import models
from effjax.data.sources.files import find_files
from effjax.training import config as configs
from effjax.training import fit, metrics

# Of each text file, the last so many bytes are held out.
HELDOUT_FRACTION = 0.1
# A backward pass multiplies twice where the forward pass multiplies once (arXiv 2001.08361, section 2.1).
PASSES = 3
HELDOUT_TOKENS = 50_000


class Trained(NamedTuple):
    """A finished run.

    Attributes:
      summary: its `summary.json`.
      report: its `report.json`.
      training_flops: what its steps spent, forward and backward, by the models' own count.
    """

    summary: dict[str, Any]
    report: dict[str, Any]
    training_flops: float

    def of_language_model(self) -> dict[str, float]:
        """The numbers that the claims about language models are held against."""
        names = ("steps", "heldout_bits_per_byte", "params", "params_active", "flops_per_token")
        row = {name: self.summary[name] for name in names}
        return row | {"training_flops": self.training_flops}


class Bench:
    """The runs of the claims.

    Attributes:
      folder: of their workdirs.
      seeds: one run of each model a seed; it sets the parameters and the order of the text.
    """

    def __init__(self, folder: Path, patterns: Sequence[str], seeds: Sequence[int]):
        """`patterns`: files of text and globs; none: the standard library of this Python."""
        self.folder, self.seeds = folder, tuple(seeds)
        self._files = find_files("data", patterns) if patterns else []

    @property
    def text(self) -> str:
        """What language models are trained on, in words."""
        if not self._files:
            return f"the source of the standard library of Python {platform.python_version()}"
        size = sum(file.stat().st_size for file in self._files) / 1e6
        names = ", ".join(file.name for file in self._files)
        return f"{names} ({size:.1f} MB, the last tenth of each file held out)"

    @functools.cached_property
    def source(self) -> ml_collections.ConfigDict:
        """The source of that text."""
        if not self._files:
            return configs.part_config("source", "stdlib")
        folder = self.folder / "text"
        for file in self._files:
            content = file.read_bytes()
            cut = round(len(content) * (1 - HELDOUT_FRACTION))
            for split, part in (("train", content[:cut]), ("heldout", content[cut:])):
                (folder / split).mkdir(parents=True, exist_ok=True)
                (folder / split / file.name).write_bytes(part)
        paths = {"paths": f"{folder}/train/*", "heldout_paths": f"{folder}/heldout/*"}
        return configs.part_config("source", "text", **paths)

    def on_text(
        self, config: ml_collections.ConfigDict, *, seq_len: int, batch_size: int
    ) -> ml_collections.ConfigDict:
        """The config of a language model with that text in rows of that size; some 50 000 tokens evaluate it."""
        config.data.source = self.source
        config.data.update(seq_len=seq_len, batch_size=batch_size)
        config.evaluation.num_batches = max(1, HELDOUT_TOKENS // (seq_len * batch_size))
        return config

    def compare(
        self,
        claim: str,
        named: Mapping[str, ml_collections.ConfigDict],
        measure: Callable[[Trained], Mapping[str, Any]],
        tried: Mapping[str, ml_collections.ConfigDict] | None = None,
    ) -> list[dict[str, Any]]:
        """What `measure` makes of a run of each config and seed, with `model` and `seed`.

        `tried`: further configs, each with the first seed only.
        """
        first = self.seeds[0]
        jobs = [(first, *item) for item in {**named, **(tried or {})}.items()]
        jobs += [(seed, *item) for seed in self.seeds[1:] for item in named.items()]
        return [
            {"model": name, "seed": seed, **measure(self.train(claim, name, config, seed))}
            for seed, name, config in jobs
        ]

    def train(self, claim: str, name: str, config: ml_collections.ConfigDict, seed: int) -> Trained:
        """Trains and evaluates, or reads what an earlier call of this claim, name and seed came to.

        Nothing is evaluated or logged before the last step.
        """
        config = config.copy_and_resolve_references()
        config.seed = config.data.seed = seed
        last = config.training.num_steps
        config.training.update(log_every=last, eval_every=last, checkpoint_every=last)
        config.training.update(eval_batches=1, keep=1)
        config.evaluation.latency_runs = 1
        workdir = self.folder / claim / f"{re.sub(r'[^a-z0-9.]+', '-', name.lower())}-seed{seed}"
        found = fit(config, workdir)
        if "interrupted_by" in found:
            raise KeyboardInterrupt(found["interrupted_by"])
        report = json.loads((workdir / "report.json").read_text())
        (line,) = metrics.read(workdir)
        positions = last * config.data.batch_size * config.data.seq_len
        return Trained(found, report, PASSES * line["flops/spent"] * positions)


def flops_per_step(config: ml_collections.ConfigDict) -> float:
    """FLOPs of a training step of a language model, by the model's own count."""
    model = models.create(**configs.resolve(config.model))
    tokens = jnp.zeros((1, config.data.seq_len), jnp.int32)

    @jax.jit
    def spent(key):
        variables = model.init(key, tokens)
        output = model.apply(variables, tokens, train=True, rngs={"routing": key})
        return output.metrics["flops/spent"]

    tokens_per_step = config.data.batch_size * config.data.seq_len
    return PASSES * float(spent(jax.random.key(0))) * tokens_per_step


def steps_for(flops: float, config: ml_collections.ConfigDict) -> int:
    """Training steps that spend so many FLOPs."""
    return round(flops / flops_per_step(config))
