"""A run small enough for a test: its config, its text, and ways to end it."""

import os
import tempfile

import flax.linen as nn
import jax
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from effjax import run_config
from effjax.training import config as configs
from effjax.training import metrics, sharding
from effjax.training.loop import Run
from effjax.training.progress import Screen

# The tests build the same small programs again and again, and in other processes; they share what is compiled.
_CACHE = None
if not jax.config.jax_compilation_cache_dir:
    _CACHE = tempfile.TemporaryDirectory(prefix="effjax-xla-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name  # for the processes that tests start
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", _CACHE.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()

TIMINGS = ("tokens_per_second", "flops_per_second")


def write_text(folder, rng, num_files=12):
    """Files of words drawn at random: enough for a few epochs to differ."""
    folder.mkdir(exist_ok=True)
    words = ["".join(rng.choice(list("abcdef"), size=rng.integers(1, 6))) for _ in range(30)]
    for i in range(num_files):
        (folder / f"{i}.txt").write_text(" ".join(rng.choice(words, size=rng.integers(20, 60))))
    return folder


def make_config(text_folder, model="transformer", num_layers=1, **training):
    """d_model 16, 12 steps; `training` overrides fields of that section."""
    config = configs.default(model, d_model=16, num_layers=num_layers)
    return on_text(config, text_folder, **training)


def on_text(config, text_folder, **training):
    """A config with 12 steps on a text; `training` overrides fields of that section."""
    source = {"paths": f"{text_folder}/*.txt", "heldout_fraction": 0.3}
    config.data.source = configs.part_config("source", "text", **source)
    config.data.update(seq_len=16, batch_size=4, shuffle_window=8)
    config.mesh.data = 1
    config.training.update(num_steps=12, log_every=3, eval_every=6, eval_batches=2)
    config.training.update(checkpoint_every=4, keep=2, keep_best=False)
    config.training.update(training)
    config.evaluation.update(num_batches=2, latency_runs=1)
    return config


def train(config, workdir, screen=None):
    """The loop without the evaluation at its end; returns the finished `Run`."""
    config = configs.resolve(config)
    workdir.mkdir(exist_ok=True)
    mesh = sharding.make_mesh(config["mesh"])
    screen = screen or quiet(Screen, config)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        with Run(config, workdir, mesh, screen) as run:
            run_config.save(workdir, config)
            run.received = run.train()
        return run


def quiet(screen_class, config, *args):
    return screen_class(*args, config["training"]["num_steps"], Console(quiet=True))


class Crash(Exception):
    """Something that nobody foresaw."""


class CrashingScreen(Screen):
    """Raises `Crash` when the metrics of a step arrive."""

    def __init__(self, at_step, *args):
        super().__init__(*args)
        self.at_step = at_step

    def advance(self, step):
        if step == self.at_step:
            raise Crash
        super().advance(step)


class SignallingScreen(Screen):
    """Sends this process a signal when the metrics of a step arrive."""

    def __init__(self, at_step, number, *args):
        super().__init__(*args)
        self.at_step, self.number = at_step, number

    def advance(self, step):
        if step == self.at_step:
            os.kill(os.getpid(), self.number)


def curve(workdir):
    """The lines of the log without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in metrics.read(workdir)
    ]


def bits(tree):
    return [(jax.tree_util.keystr(path), leaf.tobytes()) for path, leaf in leaves(tree)]


def leaves(tree):
    return jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
