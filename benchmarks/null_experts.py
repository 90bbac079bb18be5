"""Time of AdaMoE against the share of null choices: `python -m benchmarks.null_experts`.

The scores of the null experts are raised until tokens choose them as often as wanted. A pass over whole rows and a step
of decoding are timed, both without dropping tokens, the amounts in turn so that a change of the machine's speed reaches
all of them alike.
"""

import functools
import statistics
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.publish import publish
from effjax import pytree
from effjax.ffn import AdaMoE
from effjax.mixers import Attention
from effjax.models import DecoderLM

_BIASES = flags.DEFINE_list(
    "biases", ["-40", "-1", "0", "1", "2", "40"], "What is added to the scores of null experts."
)
_D_MODEL = flags.DEFINE_integer("d_model", 256, "Width.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Texts at a time.", lower_bound=1)
_LENGTH = flags.DEFINE_integer("length", 64, "Tokens of a row in a pass.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each amount.", lower_bound=1)
_OUT = flags.DEFINE_string(
    "out", "benchmarks/results/null_experts.json", "File of the measurements."
)

KINDS = ("pass", "step")


class Steered(AdaMoE):
    """AdaMoE with a parameter that is added to the scores of its null experts."""

    def route(self, logits, mask):
        bias = self.param("null_bias", nn.initializers.zeros_init(), ())
        return super().route(logits.at[..., self.num_experts :].add(bias), mask)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    timed = Timed()
    biases = [float(bias) for bias in _BIASES.value]
    rows = [{"null_choices": {}, "seconds": {kind: [] for kind in KINDS}} for _ in biases]
    for number in range(_ROUNDS.value + 1):
        for bias, row in zip(biases, rows, strict=True):
            for kind in KINDS:
                seconds, row["null_choices"][kind] = timed.run(kind, bias)
                if number:  # the first may compile
                    row["seconds"][kind].append(seconds)
    report = {
        "platform": jax.devices()[0].device_kind,
        "d_model": _D_MODEL.value,
        "batch_size": _BATCH_SIZE.value,
        "length": _LENGTH.value,
        "rows": rows,
    }
    publish(report, _OUT.value, draw, table)


class Timed:
    """A pass over whole rows, and a step of decoding behind them."""

    def __init__(self):
        batch_size, length = _BATCH_SIZE.value, _LENGTH.value
        model = DecoderLM(
            d_model=_D_MODEL.value,
            mixers=(Attention(num_heads=4, num_kv_heads=2),),
            ffn=Steered(dispatch="dropless"),
        )
        shape = (batch_size, length)
        tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocab_size)
        self._variables = jax.jit(model.init)(jax.random.key(1), tokens)
        self._choices = model.ffn.top_k
        apply = jax.jit(model.apply)
        empty = model.init_state(batch_size, 2 * length)
        state = apply(self._variables, tokens, state=empty).state
        self._programs = {
            "pass": functools.partial(apply, tokens=tokens),
            "step": functools.partial(apply, tokens=tokens[:, :1], state=state),
        }

    def run(self, kind: str, bias: float) -> tuple[float, float]:
        """Seconds that it took, and the share of null choices."""
        variables = pytree.map_paths(
            lambda path, leaf: jnp.float32(bias) if path.endswith("null_bias") else leaf,
            self._variables,
        )
        start = time.perf_counter()
        output = jax.block_until_ready(self._programs[kind](variables))
        seconds = time.perf_counter() - start
        return seconds, 1 - float(output.metrics["moe/mean_experts"]) / self._choices


def median(row: dict, kind: str) -> float:
    """Seconds."""
    return statistics.median(row["seconds"][kind])


def table(report: dict) -> Table:
    """The measurements for the eye."""
    found = Table(title=f"Milliseconds (lowest to highest), on {report['platform']}")
    for kind in KINDS:
        for name in ("null choices", kind, "of the first"):
            found.add_column(name, justify="right")
    for row in report["rows"]:
        cells = []
        for kind in KINDS:
            low, high = (f(row["seconds"][kind]) * 1e3 for f in (min, max))
            took, first = median(row, kind), median(report["rows"][0], kind)
            cells += [
                f"{row['null_choices'][kind]:.0%}",
                f"{took * 1e3:.1f} ({low:.1f}-{high:.1f})",
                f"{took / first:.2f}",
            ]
        found.add_row(*cells)
    return found


def draw(report: dict, path: Path) -> None:
    """Time against the share of null choices, as PNG."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for ax, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
        shares = [row["null_choices"][kind] for row in report["rows"]]
        ax.plot(shares, [median(row, kind) * 1e3 for row in report["rows"]], marker="o")
        ax.set(xlabel="null choices", ylabel=f"ms a {kind}", xlim=(0, 1), ylim=(0, None))
        ax.grid(alpha=0.3)
    figure.suptitle(
        f"AdaMoE on {report['platform']}: d_model {report['d_model']}, {report['batch_size']} rows",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app.run(main)
