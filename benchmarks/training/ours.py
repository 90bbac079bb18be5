"""The side of effjax: the step that `effjax.training.fit` compiles, of the `transformer` in the shape of a GPT-2."""

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from benchmarks.training import task
from benchmarks.turns import serve
from effjax import models, optim, registry
from effjax.training import config as configs
from effjax.training import lowering, sharding
from effjax.training.batches import Share
from effjax.training.state import initialise, initialiser


def config():
    """Of the run."""
    found = configs.default(
        "transformer",
        vocab_size=task.VOCABULARY,
        d_model=task.WIDTH,
        num_layers=task.LAYERS,
        max_seq_len=task.LENGTH,
        mixers=({"name": "attention", "num_heads": task.HEADS, "rope_base": None},),
        ffn={"name": "dense", "activation": "gelu_exact"},
        norm={"name": "layer", "use_bias": False},
        embed={"name": "token", "learned_positions": True},
    )
    found.data.update(seq_len=task.LENGTH, batch_size=task.BATCH)
    found.mesh.data = 1
    found.optimizer.update(
        b1=task.BETAS[0],
        b2=task.BETAS[1],
        weight_decay=task.WEIGHT_DECAY,
        clip_norm=task.CLIP_NORM,
    )
    found.optimizer.schedule = configs.part_config("schedule", "constant", peak=task.LEARNING_RATE)
    return configs.resolve(found)


class Training:
    """The state of a run, its compiled step, and how many steps it has done."""

    def __init__(self):
        run = config()
        model = models.create(**run["model"])
        optimizer, _ = optim.build(run["optimizer"], run["training"]["num_steps"])
        objective = registry.build("objective", run["objective"])
        mesh = sharding.make_mesh(run["mesh"])
        with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
            init = initialiser(model, optimizer, run)
            shardings = jax.tree.map(lambda x: x.sharding, sharding.abstract_state(init, mesh))
            self.state = initialise(init, shardings, jax.device_put(_parameters(init)))
            self.share = Share.of(mesh, task.BATCH)
            traced = lowering.trace(
                model, objective, optimizer, run["training"], self.state, self.batch(0), mesh
            )
            self.step = traced.lower().compile()
        self.steps = 0

    def batch(self, step: int) -> dict[str, jax.Array]:
        tokens, targets = task.batch(step)
        return self.share.on_devices(
            {
                "tokens": tokens,
                "targets": targets,
                "positions": np.broadcast_to(np.arange(task.LENGTH, dtype=np.int32), tokens.shape),
                "segment_ids": np.ones_like(tokens),
                "loss_mask": np.ones_like(tokens, np.float32),
            }
        )

    def run(self, steps: int) -> list[float]:
        """Losses of so many further steps."""
        losses = []
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch(self.steps))
            losses.append(metrics["loss"])
            self.steps += 1
        return [float(loss) for loss in jax.device_get(losses)]

    def num_parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.state.params))


def _parameters(init):
    """The numbers that all sides start from, in the model's tree."""
    weights = task.weights()

    def value(path, leaf):
        names = path[-2:] if path[0] == "embed" else path
        if names[-1] == "scale":
            return np.ones(leaf.shape, np.float32)
        if path[0] == "embed":
            return weights[names[-1]]
        layer = next(name for name in path if name.startswith("blocks_")).removeprefix("blocks_")
        return weights[f"{layer}/{names[-2]}"]

    flat = flax.traverse_util.flatten_dict(jax.eval_shape(init).params)
    return flax.traverse_util.unflatten_dict({path: value(path, x) for path, x in flat.items()})


def programs() -> dict:
    training = Training()
    return {
        "compare": lambda: training.run(task.COMPARED),
        "resume": lambda: training.run(1),
        "train": lambda: training.run(task.STEPS),
        "parameters": training.num_parameters,
    }


if __name__ == "__main__":
    serve(programs())
