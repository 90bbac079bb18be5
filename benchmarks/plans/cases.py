"""Which recipe is planned for which machine, and what is aimed at."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    """A plan.

    Attributes:
      recipe: file in `configs/`, and its size: "mor:1.7b".
      topology: the machine.
      flags: of `train.py`, beside those.
      target: share of the chips' peak that is aimed at; None where memory is of interest.
    """

    recipe: str
    topology: str
    flags: tuple[str, ...] = ()
    target: float | None = None

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        return f"{self.recipe}@{self.topology}"


# A row a chip, on any number of chips.
_ONE_ROW = {"v5p:4x4x4": 64, "v5p:4x8x8": 256, "v5p:8x8x8": 512, "v5p:16x16x16": 4096}

# A matrix of 2048 rows is split in 64 and no more: of so narrow a share as 8 rows gradients would be summed whole.
_OVER_64 = ("--config.mesh.data=-1", "--config.mesh.fsdp=64")


def _with_rows(rows: int) -> tuple[str, ...]:
    """So many rows a step: what is gathered is worth it if there are enough of them on a chip."""
    return (*_OVER_64, f"--config.data.batch_size={rows}")


def _one_row_of(tokens: int, chips: int) -> tuple[str, ...]:
    """Of which each chip has its share."""
    return (
        f"--config.mesh.context={chips}",
        "--config.mesh.fsdp=1",
        "--config.data.batch_size=1",
        "--config.data.shards=1",
        f"--config.data.seq_len={tokens}",
        f"--config.model.max_seq_len={tokens}",
    )


UTILIZATION = (
    Case("transformer:1.7b", "v5e:16x16", _OVER_64, 0.5),
    Case("mor:1.7b", "v5e:16x16", _OVER_64, 0.5),
    Case("transformer:1.7b", "v5p:8x8x8", _with_rows(1024), 0.5),
    # Of the rows that go to later recursions there are fewer tokens.
    Case("mor:1.7b", "v5p:8x8x8", _with_rows(2048), 0.5),
    # Nothing has to be recomputed where there are 95 GiB.
    Case("adamoe:mixtral-8x7b", "v5p:8x8x8", ("--config.model.remat=none",), 0.4),
)
MEMORY = tuple(
    Case(recipe, topology, _with_rows(chips))
    for recipe in ("transformer:135m", "mor:135m")
    for topology, chips in _ONE_ROW.items()
)
CONTEXT = tuple(
    Case("transformer:360m", topology, _one_row_of(8192 * chips, chips))
    for topology, chips in {
        "v5p:1x1x1": 1,
        "v5p:2x2x1": 4,
        "v5p:2x2x4": 16,
        "v5p:4x4x4": 64,
    }.items()
)
CASES = {case.name: case for case in (*UTILIZATION, *MEMORY, *CONTEXT)}
