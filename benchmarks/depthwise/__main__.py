"""Makes texts by plain and by depth-wise batching and writes a table, JSON and a picture.

Untrained models whose router is made to give each of some mean depths say what depth-wise batching gains at it. With
`--workdirs`, of a "mor" and a "recursive" model that `train.py` has trained at one size, these models follow, at the
depth that training has led to, with what they lose on held-out text; the untrained ones are then of their size. The
ways take turns, so that a change of the machine's speed reaches all of them alike.
"""

import json
import statistics
from pathlib import Path

import jax
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.depthwise.texts import Way, Workload, random_variables, steerable, steered
from benchmarks.publish import publish
from effjax import data, models
from effjax.evaluation.run import Restored, restore
from effjax.models import SequenceModel
from effjax.serving import DepthwiseGeneration

_D_MODEL = flags.DEFINE_integer("d_model", 512, "Width.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 14, "Layers that a token passes at full depth.")
_NUM_RECURSIONS = flags.DEFINE_integer("num_recursions", 3, "Recursions.", lower_bound=2)
_SHARING = flags.DEFINE_enum(
    "sharing",
    "middle_cycle",
    ("cycle", "middle_cycle"),
    "Whether a first and a last layer are left out of it.",
)
_MEAN_DEPTHS = flags.DEFINE_list(
    "mean_depths", ["1.2", "1.5", "2", "3"], "Recursions that tokens of untrained models take."
)
_NUM_TEXTS = flags.DEFINE_integer("num_texts", 64, "Texts in all.", lower_bound=1)
_NUM_SLOTS = flags.DEFINE_integer("num_slots", 32, "Texts at a time.", lower_bound=1)
_PROMPT = flags.DEFINE_integer("prompt_length", 16, "Tokens of a prompt.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("num_tokens", 128, "New tokens of a text.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns of each way.", lower_bound=1)
_WORKDIRS = flags.DEFINE_list(
    "workdirs", [], "Folders of a trained mor and a trained recursive model, whose size is taken."
)
_OUT = flags.DEFINE_string("out", "benchmarks/results/depthwise.json", "File of the measurements.")

RECURSIVE, PLAIN, DEPTHWISE = "recursive, plain", "mor, plain", "mor, depth-wise"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    if len(_WORKDIRS.value) not in (0, 2):
        raise app.UsageError(f"--workdirs={_WORKDIRS.value}; valid: two folders, or none")
    runs = [restore(None, workdir) for workdir in _WORKDIRS.value]
    mor, recursive = (run.model for run in runs) if runs else models_of_flags()
    report = {
        "platform": jax.devices()[0].device_kind,
        "num_slots": _NUM_SLOTS.value,
        "num_texts": _NUM_TEXTS.value,
        "num_tokens": _TOKENS.value,
        "size": {"d_model": mor.d_model, "num_layers": mor.num_layers},
        **shape_of(mor),
        "rows": swept(recursive, steerable(mor)) if _MEAN_DEPTHS.value else [],
        "trained": trained(*runs) if runs else None,
    }
    publish(report, _OUT.value, draw, table)


def models_of_flags() -> tuple[SequenceModel, SequenceModel]:
    """The two models, with random parameters still to come."""
    size = {
        "d_model": _D_MODEL.value,
        "num_layers": _NUM_LAYERS.value,
        "mixers": ({"name": "attention", "num_heads": 8, "num_kv_heads": 4},),
    }
    depth = {"num_recursions": _NUM_RECURSIONS.value, "sharing": _SHARING.value}
    return tuple(models.create(name, **size, depth=depth) for name in ("mor", "recursive"))


def swept(recursive: SequenceModel, mor: SequenceModel) -> list[dict]:
    """Untrained models whose router is made to give each mean depth, with random prompts."""
    rng = np.random.default_rng(0)
    shape = (_NUM_TEXTS.value, _PROMPT.value)
    work = Workload(list(rng.integers(mor.vocab_size, size=shape)), _TOKENS.value, _NUM_SLOTS.value)
    beginning, rows = random_variables(mor), []
    baseline = (recursive, random_variables(recursive))
    compile_all(work, baseline, (mor, beginning))
    depths = [float(depth) for depth in _MEAN_DEPTHS.value]
    for depth in track(depths, description="mean depths", console=Console(stderr=True)):
        variables = steered(mor, beginning, depth)
        rows.append(measure(work, baseline, (mor, variables)))
    return rows


def trained(mor: Restored, recursive: Restored) -> dict:
    """Trained models, with the beginnings of held-out texts as prompts, and their loss on such text."""
    prompts = []
    for batch in data.build(mor.config["data"], split="heldout"):
        prompts += list(batch["tokens"][:, : _PROMPT.value])
        if len(prompts) >= _NUM_TEXTS.value:
            break
    work = Workload(prompts[: _NUM_TEXTS.value], _TOKENS.value, _NUM_SLOTS.value)
    sides = [(run.model, run.variables) for run in (recursive, mor)]
    compile_all(work, *sides)
    summaries = [Path(workdir) / "summary.json" for workdir in _WORKDIRS.value]
    losses = [json.loads(s.read_text("utf-8"))["heldout_bits_per_byte"] for s in summaries]
    return {
        **measure(work, *sides),
        "training_steps": mor.step,
        "heldout_bits_per_byte": dict(zip(("mor", "recursive"), losses, strict=True)),
    }


def shape_of(model: SequenceModel) -> dict:
    """Of how many layers a recursion is, and how many are around the recursions."""
    layout = model.depth.layout(model.stack())
    around = len(layout.first) + len(layout.last)
    num_recursions = model.depth.num_recursions
    return {
        "num_recursions": num_recursions,
        "sharing": model.depth.sharing,
        "layers_around": around,
        "layers_of_recursion": (model.num_layers - around) // num_recursions,
    }


def measure(work: Workload, recursive: tuple, mor: tuple) -> dict:
    """Tokens a second of each way in each round, and the depth that tokens had."""
    ways = ways_of(work, recursive, mor)
    speeds, texts = {name: [] for name in ways}, {}
    for _ in range(_ROUNDS.value):
        for name, way in ways.items():
            speed, texts[name] = way.run()
            speeds[name].append(speed)
    (made,) = texts[DEPTHWISE]
    check_same(made, texts[PLAIN])
    return {
        "mean_depth": made.mean_depth,
        "occupancy": made.occupancy,
        "steps": made.steps,
        "tokens_per_second": speeds,
    }


def compile_all(work: Workload, recursive: tuple, mor: tuple) -> None:
    """Makes the texts once, so that what is measured compiles nothing."""
    for way in ways_of(work, recursive, mor).values():
        way.run()


def ways_of(work: Workload, recursive: tuple, mor: tuple) -> dict[str, Way]:
    """What is compared, of models with their variables."""
    return {
        RECURSIVE: Way(*recursive, work.plain),
        PLAIN: Way(*mor, work.plain),
        DEPTHWISE: Way(*mor, work.depthwise),
    }


def check_same(made: DepthwiseGeneration, plain: list) -> None:
    """Raises RuntimeError if more than a few texts differ: where two tokens are nearly alike, rounding decides."""
    want = np.concatenate([texts.tokens for texts in plain])
    differ = np.mean(np.any(made.tokens != want, axis=1))
    if differ > 0.1:
        raise RuntimeError(f"{differ:.0%} of the texts are not those of plain batching")


def median(row: dict, name: str) -> float:
    """Tokens a second."""
    return statistics.median(row["tokens_per_second"][name])


def gain(row: dict) -> float:
    """How many times the tokens a second of the recursive model, the median of the rounds."""
    speeds = row["tokens_per_second"]
    pairs = zip(speeds[DEPTHWISE], speeds[RECURSIVE], strict=True)
    return statistics.median(ours / theirs for ours, theirs in pairs)


def ideal(report: dict, depth: float) -> tuple[float, float]:
    """Most that can be gained at a mean depth: by recursions alone, and with the layers around them."""
    full, around = report["num_recursions"], report["layers_around"]
    layers = lambda depth: around + depth * report["layers_of_recursion"]  # noqa: E731
    return full / depth, layers(full) / layers(depth)


def table(report: dict) -> Table:
    """The measurements for the eye."""
    found = Table(title=f"Tokens a second (lowest to highest), on {report['platform']}")
    names = (RECURSIVE, PLAIN, DEPTHWISE)
    columns = ("router", "mean depth", *names, "gain", "by layers", "N / depth", "occupancy")
    for name in columns:
        found.add_column(name, justify="right")
    trained = report["trained"]
    rows = [("steered", row) for row in report["rows"]]
    for router, row in rows + ([("trained", trained)] if trained else []):
        speeds = row["tokens_per_second"]
        by_recursions, by_layers = ideal(report, row["mean_depth"])
        found.add_row(
            router,
            f"{row['mean_depth']:.2f}",
            *(f"{median(row, n):.0f} ({min(speeds[n]):.0f}-{max(speeds[n]):.0f})" for n in names),
            f"{gain(row):.2f}x",
            f"{by_layers:.2f}x",
            f"{by_recursions:.2f}x",
            f"{row['occupancy']:.0%}",
        )
    if trained:
        losses = trained["heldout_bits_per_byte"].items()
        found.caption = "held-out bits a byte of the trained: " + ", ".join(
            f"{name} {loss:.3f}" for name, loss in losses
        )
    return found


def draw(report: dict, path: Path) -> None:
    """Tokens a second against mean depth, as PNG."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    rows = sorted(report["rows"], key=lambda row: row["mean_depth"])
    depths = [row["mean_depth"] for row in rows]
    for name in (RECURSIVE, PLAIN, DEPTHWISE):
        (line,) = ax.plot(depths, [median(row, name) for row in rows], marker="o", label=name)
        if trained := report["trained"]:
            at = (trained["mean_depth"], median(trained, name))
            label = "trained" if name == DEPTHWISE else None
            ax.plot(*at, "*", markersize=13, color=line.get_color(), label=label)
    all_rows = rows + ([report["trained"]] if report["trained"] else [])
    base = statistics.median(median(row, RECURSIVE) for row in all_rows)
    grid = np.linspace(min([1.0, *depths]), report["num_recursions"], 50)
    lines = np.array([ideal(report, depth) for depth in grid]) * base
    ax.plot(grid, lines[:, 1], ":", color="gray", label="ideal, all layers counted")
    ax.plot(grid, lines[:, 0], "--", color="gray", label="ideal, N / mean depth")
    ax.set(xlabel="mean recursions a token", ylabel="tokens a second", ylim=(0, None))
    ax.grid(alpha=0.3)
    ax.legend()
    size = f"d_model {report['size']['d_model']}, {report['size']['num_layers']} layers, {report['sharing']}"
    figure.suptitle(
        f"{report['num_slots']} texts at a time on {report['platform']}: {size}", fontsize=10
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
