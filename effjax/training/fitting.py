"""A whole run from its config: train, evaluate, leave everything in the workdir."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from rich.console import Console

from effjax import compilation, evaluation, processes, run_config
from effjax.training import config as configs
from effjax.training import curves, metrics, sharding, summary
from effjax.training.loop import Run
from effjax.training.progress import Screen


def fit(config: Mapping[str, Any], workdir: str | Path) -> dict[str, Any]:
    """Trains and evaluates the model of a config, or goes on where an earlier start of it ended.

    The workdir gets `config.json`, `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`, the files of
    `effjax.evaluation.evaluate`, and `summary.json`.

    SIGTERM and SIGINT end it after the current step with a checkpoint. However a run ends, the next `fit` with the same
    config and workdir continues from the last complete checkpoint with the very next batch, so that on the same mesh
    its losses are bit for bit those of a run that was never interrupted.

    Called by each of several processes (`effjax.training.distributed.joined`), it is one run of all of them over all
    their devices, with one workdir that all can reach; the first process writes the files and speaks.

    Args:
      config: as `effjax.training.config.default` makes it.
      workdir: new, empty, or of an earlier start with the same config (length, intervals and mesh may differ).

    Returns:
      The summary (`effjax.training.summary.summarise`), which is also in `summary.json`. After a signal, the `steps`
      done so far and `interrupted_by`. For a run that has finished before, its summary as it was.

    Raises:
      ValueError: for a config that cannot work, naming field, value and what is valid.
      CheckpointError: if the workdir belongs to another config, or none of its checkpoints can be read.
      NonFiniteLossError: if the loss or its gradient is not finite.
    """
    configs.check(config)
    config = configs.resolve(config)
    workdir = Path(workdir)
    run_config.check_same_run(workdir, config)
    num_steps = config["training"]["num_steps"]
    screen = Screen(num_steps, None if processes.is_first() else Console(quiet=True))
    earlier = summary.read(workdir)
    if earlier is not None and earlier["steps"] >= num_steps:
        screen.say(f"{workdir} has done its {earlier['steps']} steps already; its summary:")
        screen.console.print(summary.table(earlier))
        return earlier
    compilation.enable_cache()
    _make_folder(workdir)
    mesh = sharding.make_mesh(config["mesh"])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        with Run(config, workdir, mesh, screen) as run:
            if processes.is_first():
                run_config.save(workdir, config)
            screen.say(_opening(run, workdir))
            with _drawn_at_the_end(workdir):
                signal = run.train()
            if signal is not None:
                screen.say(
                    f"{signal.name}: stopped after step {run.step}, all saved; start again to go on"
                )
                return {"steps": run.step, "interrupted_by": signal.name}
        screen.say("evaluating on held-out data")
        report = evaluation.evaluate_variables(
            config,
            run.current_model,
            run.state.variables(),
            workdir,
            step=run.step,
            rows=run.share.rows.tolist(),
            on_devices=run.share.on_devices,
        )
    found = summary.summarise(report, run)
    if processes.is_first():
        _publish(found, workdir, screen)
    return found


@contextlib.contextmanager
def _drawn_at_the_end(workdir: Path) -> Iterator[None]:
    """Draws the curves of what was trained, also of a run that failed; that these cannot be drawn then is no news."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _draw(workdir)
        raise
    _draw(workdir)


def _draw(workdir: Path) -> None:
    if processes.is_first():
        curves.draw(workdir, metrics.read(workdir))


def _publish(found: Mapping[str, Any], workdir: Path, screen: Screen) -> None:
    """Draws, writes and shows what the run came to."""
    baselines = {
        name: found[f"{name}_bits_per_byte"]
        for name in ("unigram", "bigram")
        if f"{name}_bits_per_byte" in found
    }
    curves.draw(workdir, metrics.read(workdir), baselines)
    summary.write(workdir, found)
    screen.console.print(summary.table(found))
    screen.say(f"wrote {workdir}: {', '.join(sorted(os.listdir(workdir)))}")


def _make_folder(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"workdir {str(workdir)!r}: {error.strerror}; valid: a folder, or a path for one"
        ) from error


def _opening(run: Run, workdir: Path) -> str:
    params = sum(x.size for x in jax.tree.leaves(run.state.params))
    devices = jax.devices()
    start = f"going on after step {run.step}" if run.step else "starting"
    together = f" of {jax.process_count()} processes" if processes.several() else ""
    return (
        f"{run.config['model']['name']} with {params:,} parameters on {len(devices)} x {devices[0].device_kind}"
        f"{together}; {start} in {workdir}"
    )
