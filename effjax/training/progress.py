"""What a run says while it runs: a line at each logged step, under it a bar where there is a terminal to draw one."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Metric, its name on the screen, and its format; those that a model does not report are left out.
_SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("bits_per_byte", "bits/byte", "{:.3f}"),
    ("heldout/loss", "held-out loss", "{:.3f}"),
    ("heldout/bits_per_byte", "held-out bits/byte", "{:.3f}"),
    ("depth/mean_recursions", "recursions", "{:.2f}"),
    ("depth/fraction_dropped", "dropped", "{:.1%}"),
    ("depth/router_entropy", "router entropy", "{:.2f}"),
    ("moe/mean_experts", "experts", "{:.2f}"),
    ("moe/fraction_dropped", "dropped", "{:.1%}"),
    ("moe/router_entropy", "router entropy", "{:.2f}"),
    ("skipped", "skipped", "{:.0f}"),
)


class Screen:
    """Prints the course of a run; a context manager, while which the bar is drawn.

    Attributes:
      console: where it is printed.
    """

    def __init__(self, num_steps: int, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._num_steps = num_steps
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("training", total=num_steps)

    def __enter__(self) -> "Screen":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        """Prints a line of prose."""
        self.console.print(message, markup=False)

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float], seconds_per_step: float | None) -> None:
        """Prints the values of a logged step; the time left is reckoned from `seconds_per_step`."""
        width = len(str(self._num_steps))
        parts = [f"step {step:{width}}/{self._num_steps}", *describe(values)]
        if seconds_per_step:
            parts.append(f"{clock((self._num_steps - step) * seconds_per_step)} left")
        self.say("  ".join(parts))


def describe(values: Mapping[str, float]) -> list[str]:
    """The values that a reader watches, as phrases: `loss 2.310`, `12.3k tokens/s`, `FLOPs 61% of dense`."""
    parts = [f"{name} {form.format(values[key])}" for key, name, form in _SHOWN if key in values]
    spent, full = values.get("flops/spent"), values.get("flops/full")
    if spent and full:
        share = "" if spent == full else f" ({spent / full:.0%} of dense)"
        parts.append(f"{si(spent)}FLOP/token{share}")
    if "tokens_per_second" in values:
        parts.append(f"{si(values['tokens_per_second'])}tokens/s")
    if "flops_per_second" in values:
        parts.append(f"{si(values['flops_per_second'])}FLOP/s")
    return parts


def si(number: float) -> str:
    """A number with three digits and its SI prefix: `12.3 k`, `4.56 G`; ends where the unit begins."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            return f"{number:.3g} {prefix}"
        number /= 1000
    return f"{number:.3g} E"


def clock(seconds: float) -> str:
    """A time as `m:ss` or `h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
