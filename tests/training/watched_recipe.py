"""The run of test_distributed, whose source notes what is read; `--config=watched_recipe.py:<text>,<notes>,<model>`."""

import dataclasses
import os
import signal
from pathlib import Path

import jax
import tiny_run

from effjax.data.sources import TextFiles
from effjax.registry import register
from effjax.training import config as configs

# "1:30" sends SIGTERM to process 1 when it reads its 30th training document.
STOP_AT = "WATCHED_STOP_AT"


class _Documents:
    def __init__(self, documents, notes):
        self._documents, self._notes, self._count = documents, Path(notes), 0

    def __len__(self):
        return len(self._documents)

    def __getitem__(self, index):
        self._count += 1
        process = jax.process_index()
        with (self._notes / str(process)).open("a") as file:
            file.write(f"{index}\n")
        if os.environ.get(STOP_AT) == f"{process}:{self._count}":
            os.kill(os.getpid(), signal.SIGTERM)
        return self._documents[index]


@register("source", "test_watched")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched(TextFiles):
    """Text files; the number of each training document that is read goes to a file named after the process."""

    notes: str

    def documents(self, split):
        documents = super().documents(split)
        return _Documents(documents, self.notes) if split == "train" else documents


MODELS = {
    "transformer": {"num_layers": 1},
    "mor": {"num_layers": 2, "depth.num_recursions": 2, "depth.sharing": "cycle"},
}


def get_config(argument):
    text, notes, model = argument.split(",")
    config = configs.default(model, d_model=16, **MODELS[model])
    config = tiny_run.on_text(config, text, log_every=1, eval_every=100, checkpoint_every=100)
    source = {"paths": f"{text}/*.txt", "heldout_fraction": 0.3, "notes": notes}
    config.data.source = configs.part_config("source", "test_watched", **source)
    config.data.update(shards=4, prefetch=0)
    config.mesh.data = 2
    return config
