"""Evaluation of a run: from its config and checkpoint to a report with everything that suits its model."""

import functools
import itertools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
from jax.sharding import Mesh

from effjax import checkpoint, data, models, processes, run_config
from effjax.evaluation import cost, report
from effjax.evaluation.baselines import ngram_baselines
from effjax.evaluation.forward import compile_forward, inputs_of
from effjax.evaluation.heldout import evaluate_language_model
from effjax.evaluation.pair_retrieval import embed_pairs, evaluate_retrieval, nested_dims
from effjax.evaluation.recall import evaluate_recall
from effjax.evaluation.token_compute import measure_token_compute
from effjax.models import SequenceModel
from effjax.training import sharding
from effjax.training.batches import Share

logger = logging.getLogger(__name__)

PLOTS_FOLDER = "plots"
# Bins of the loss by position, and batches whose tokens are counted and drawn.
_POSITION_BINS = 24
_TOKEN_BATCHES = 8

Batch = Mapping[str, Any]
Drawing = Callable[[Path], list[Path]]  # draws into a path; returns what it wrote


def evaluate(config: Mapping[str, Any] | None, workdir: str | Path) -> dict[str, Any]:
    """Evaluates a checkpoint of a run and writes `report.json`, `report.txt` and `plots/` beside it.

    The parameters and the rows of a batch are split over a mesh, on one process or on several
    (`effjax.training.distributed.joined`): that of `config`, or that of the run. Where the run's does not fit the
    devices that are here, it is as many of them as divide a batch, which the log says.

    Args:
      config: of the evaluation; its model must be the one that was trained. None takes the config
        of the run. `evaluation.step`, if there, chooses the checkpoint; else it is the newest.
      workdir: of the run.

    Returns:
      The report, as in `report.json`.

    Raises:
      CheckpointError: if the workdir has no config or no checkpoint that can be read.
      ValueError: if `config` has another model than the run, a field that is not valid, or a mesh that does not fit.
    """
    chosen = _chosen(config, workdir)
    mesh = _mesh_of(chosen) if config is not None else _mesh_here(chosen)
    share = Share.of(mesh, chosen["data"]["batch_size"])
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        run = _restored(chosen, workdir, mesh)
        return evaluate_variables(
            run.config,
            run.model,
            run.variables,
            workdir,
            step=run.step,
            rows=share.rows.tolist(),
            on_devices=share.on_devices,
        )


class Restored(NamedTuple):
    """A trained model.

    Attributes:
      config: of the evaluation, as plain values.
      model: the model as it was at that step.
      variables: its variables.
      step: the update after which they were saved.
    """

    config: dict[str, Any]
    model: SequenceModel
    variables: Any
    step: int


def restore(
    config: Mapping[str, Any] | None, workdir: str | Path, mesh: Mesh | None = None
) -> Restored:
    """The model of a run with the variables of a checkpoint.

    Args:
      config: as for `evaluate`, as are the errors.
      workdir: of the run.
      mesh: what the variables are split over, as in training; None puts them on the first device.
    """
    return _restored(_chosen(config, workdir), workdir, mesh)


def _restored(config: dict[str, Any], workdir: str | Path, mesh: Mesh | None) -> Restored:
    step = config.get("evaluation", {}).get("step")
    shardings = mesh and functools.partial(sharding.state_shardings, mesh=mesh)
    variables, step = checkpoint.restore_variables(workdir, step, shardings)
    return Restored(config, models.create(**config["model"]).at_step(step), variables, step)


def _chosen(config: Mapping[str, Any] | None, workdir: str | Path) -> dict[str, Any]:
    """The config of the evaluation, as plain values."""
    trained = plain_config(run_config.load(workdir))
    if config is None:
        return trained
    config = plain_config(config)
    _check_same_model(trained["model"], config["model"], workdir)
    return config


def _mesh_of(config: Mapping[str, Any]) -> Mesh:
    """The mesh of a config; raises ValueError if it does not fit the devices or the batches."""
    mesh = sharding.make_mesh(config.get("mesh", {}))
    sharding.check_batch(config["data"]["batch_size"], config["data"]["seq_len"], mesh)
    return mesh


def _mesh_here(config: Mapping[str, Any]) -> Mesh:
    """The mesh of a config, or one for the devices that are here if that does not fit them."""
    try:
        return _mesh_of(config)
    except ValueError as error:
        count = math.gcd(config["data"]["batch_size"], jax.device_count())
        logger.warning(
            "%s; evaluating on %d of the devices here, mesh.fsdp=%d", error, count, count
        )
        return sharding.make_mesh({"fsdp": count})


def evaluate_variables(
    config: Mapping[str, Any],
    model: SequenceModel,
    variables: Any,
    workdir: str | Path,
    *,
    step: int | None = None,
    rows: Sequence[int] | None = None,
    on_devices: Callable[[Batch], Batch] = dict,
) -> dict[str, Any]:
    """`evaluate` for a model and variables that are in memory.

    On several processes all of them call it; the first writes the files, and it alone reads the training text for the
    baselines of n-grams.

    Args:
      config: see `evaluate`; the sections data, objective and evaluation are read.
      model: the model.
      variables: its variables, wherever they live.
      workdir: an existing folder.
      step: the update after which the variables are as they are, for the report.
      rows: which rows of each batch this process makes; None makes all.
      on_devices: puts those rows where the model runs; the default leaves that to JAX.

    Returns:
      The report, as in `report.json`.
    """
    config = plain_config(config)
    options = {"num_batches": 64, "latency_runs": 10} | config.get("evaluation", {})
    batches = functools.partial(_batches, config["data"], rows, on_devices, options["num_batches"])
    first = next(batches(), None)
    if first is None:
        raise ValueError(
            "data: the held-out split has no batch; valid: a source with held-out text"
        )
    devices = jax.devices()
    results: dict[str, Any] = {
        "model": config["model"]["name"],
        "step": step,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
    drawings: dict[str, Drawing] = {}
    logger.info("compiling the forward pass")
    inputs = inputs_of(first)
    forward = compile_forward(model, variables, inputs)
    if "loss_mask" in first:
        suite = _language_model(config, model, variables, batches, forward)
    elif "query_tokens" in first:
        suite = _embedder(config, variables, batches, forward)
    else:
        raise ValueError(
            f"data: batches of {', '.join(first)}; valid: text (loss_mask) or pairs (query_tokens)"
        )
    for found, drawn in suite:
        results |= found
        drawings |= drawn
    results |= _cost(model, variables, inputs, forward, options["latency_runs"], results)
    if not processes.is_first():
        return report.plain(results)
    results["plots"] = _draw(drawings, Path(workdir))
    results = report.plain(results)
    report.write(results, workdir)
    return results


def plain_config(config: Mapping[str, Any] | ml_collections.ConfigDict) -> dict[str, Any]:
    """A config as dicts, lists and values, references and placeholders resolved."""
    return json.loads(ml_collections.ConfigDict(config).to_json())


def _language_model(config, model, variables, batches, forward) -> Iterator[tuple[dict, dict]]:
    """(results, drawings) of each part of the evaluation of a language model."""
    logger.info("held-out loss")
    tokenizer = data.tokenizer(config["data"])
    is_text = config["data"]["source"]["name"] != "associative_recall"
    heldout = evaluate_language_model(
        model,
        variables,
        batches(),
        tokenizer.token_num_bytes * is_text,
        output_sharding=_replicated(variables),
    )
    by_position = heldout.by_position(_POSITION_BINS)
    results = {
        "loss": heldout.loss,
        "bits_per_byte": heldout.bits_per_byte,
        "tokens": heldout.token_counts.sum(),
        "bytes": heldout.byte_counts.sum(),
        "metrics": heldout.metrics,
        "by_position": _rows(by_position),
    }
    baselines = {}
    if not is_text:
        logger.info("associative recall")
        recall = evaluate_recall(model, variables, batches())
        by_distance = recall.by_distance()
        found = {
            "accuracy": recall.accuracy,
            "answers": recall.answers.sum(),
            "by_distance": _rows(by_distance),
        }
        draw = _plot("recall_by_distance", by_distance, recall.accuracy)
        yield {"associative_recall": found}, {"associative_recall.png": draw}
    else:
        if processes.is_first():
            logger.info("n-gram baselines")
            baselines = ngram_baselines(config["data"])
        results["baselines"] = {f"{name}_bits_per_byte": x for name, x in baselines.items()}
    draw = _plot("loss_by_position", by_position, baselines)
    yield {"heldout": results}, {"loss_by_position.png": draw}
    logger.info("compute by token")
    few = itertools.islice(batches(), _TOKEN_BATCHES)
    for name, used in measure_token_compute(forward, variables, few, tokenizer).items():
        what, unit = _TOKEN_LABELS.get(name, (name, name))
        counts = [{"value": v, "tokens": n} for v, n in sorted(used.counts.items())]
        yield (
            {f"token_{name}": {"mean": used.mean, "counts": counts}},
            {
                f"histogram_{name}.png": _plot("histogram", used.counts, unit, what),
                f"text_{name}.png": _text(
                    used.passages, f"{what}: {used.mean:.2f} on average", unit
                ),
            },
        )


_TOKEN_LABELS = {
    "depth": ("Recursions", "recursions of a token"),
    "experts": ("True experts", "true experts of a token, summed over layers"),
}


def _embedder(config, variables, batches, forward) -> Iterator[tuple[dict, dict]]:
    """(results, drawings) of each part of the evaluation of an embedder."""
    logger.info("retrieval")
    embedded = embed_pairs(forward, variables, batches())
    size = embedded.documents.shape[1]
    dims = nested_dims(size, config.get("objective", {}).get("matryoshka_dims"))
    rows = evaluate_retrieval(embedded, dims)
    recall = {
        f"recall@{row['k']} with {row['dims'][-1]}": row["recall"]
        for row in rows
        if row["method"] == "full"
    }
    found = {
        "queries": len(embedded.queries),
        "documents": len(embedded.documents),
        **recall,
        "curve": rows,
    }
    yield (
        {"retrieval": found},
        {
            "recall_by_dimension.png": _plot("recall_by_dimension", rows),
            "adaptive_retrieval.png": _plot("adaptive_retrieval", rows, 1),
        },
    )


def _cost(model, variables, inputs, forward, num_runs, results) -> dict[str, Any]:
    """Parameters, FLOPs, memory and time; FLOPs are those of the held-out text if it was read."""
    logger.info("cost")
    _, flops = forward(variables, inputs)
    metrics = results.get("heldout", {}).get("metrics", {})
    flops = {name: float(metrics.get(name, flops[name])) for name in ("flops/spent", "flops/full")}
    share = cost.expert_share(model, metrics.get("moe/mean_experts"))
    rows, length = inputs["tokens"].shape
    return {
        "parameters": cost.count_parameters(variables["params"], used_experts=share),
        "cost": {
            "flops_per_token": flops["flops/spent"],
            "flops_per_token_if_nothing_is_skipped": flops["flops/full"],
            "decode_state_bytes_per_sequence": cost.decode_state_bytes(model, length),
            "batch": f"{rows} x {length}",
            "memory_bytes": cost.measure_memory(forward),
            "latency": cost.measure_latency(forward, variables, inputs, num_runs),
        },
    }


def _replicated(variables: Any) -> jax.sharding.Sharding | None:
    """Every device of the mesh that the variables live on; None where they live on no mesh."""
    where = getattr(jax.tree.leaves(variables)[0], "sharding", None)
    if isinstance(where, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(where.mesh, jax.sharding.PartitionSpec())
    return None


def _batches(config, rows, on_devices, num_batches) -> Iterator[Batch]:
    found = data.build(config, split="heldout", rows=rows)
    try:
        yield from map(on_devices, itertools.islice(found, num_batches))
    finally:
        found.close()


def _rows(table: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A dict of columns as a list of rows."""
    return [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]


def _plot(name: str, *args: Any) -> Drawing:
    """Draws the chart of that name, when it comes to that."""

    def draw(path: Path) -> list[Path]:
        from effjax.evaluation import plots  # matplotlib takes a second to import

        return [plots.save(getattr(plots, name)(*args), path)]

    return draw


def _text(passages, title: str, label: str) -> Drawing:
    """Draws text, when it comes to that."""

    def draw(path: Path) -> list[Path]:
        from effjax.evaluation.heatmap import text_heatmap

        return text_heatmap(passages, path, title=title, label=label)

    return draw


def _draw(drawings: Mapping[str, Drawing], workdir: Path) -> list[str]:
    """Draws everything into `plots/`; returns the paths below the workdir."""
    logger.info("plots")
    folder = workdir / PLOTS_FOLDER
    folder.mkdir(exist_ok=True)
    paths = [path for name, draw in drawings.items() for path in draw(folder / name)]
    return [path.relative_to(workdir).as_posix() for path in paths]


def _check_same_model(trained: Any, given: Any, workdir: str | Path) -> None:
    different = list(_differences(trained, given, "model"))
    if different:
        raise ValueError(
            f"workdir {workdir} was trained with another model: {'; '.join(different)}; "
            "valid: the same values, or no --config"
        )


def _differences(trained: Any, given: Any, where: str) -> Iterator[str]:
    if isinstance(trained, list) and isinstance(given, list) and len(trained) == len(given):
        trained, given = (dict(enumerate(values)) for values in (trained, given))
    if isinstance(trained, dict) and isinstance(given, dict):
        for key in trained.keys() | given.keys():
            yield from _differences(trained.get(key), given.get(key), f"{where}.{key}")
    elif trained != given:
        yield f"{where} (there: {trained!r}, given: {given!r})"
