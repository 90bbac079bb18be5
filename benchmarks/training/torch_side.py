"""The side of PyTorch; run by a Python that has torch and NumPy, `eager` or `compiled` as its argument says.

The model is written as nanoGPT's: queries, keys and values are one product, attention is the fused
`scaled_dot_product_attention`, and AdamW is the fused one. What is compiled is the model with its loss.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.training import task
from benchmarks.turns import serve


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(task.WIDTH, bias=False)
        self.qkv = nn.Linear(task.WIDTH, 3 * task.WIDTH, bias=False)
        self.out = nn.Linear(task.WIDTH, task.WIDTH, bias=False)
        self.ffn_norm = nn.LayerNorm(task.WIDTH, bias=False)
        self.up = nn.Linear(task.WIDTH, 4 * task.WIDTH, bias=False)
        self.down = nn.Linear(4 * task.WIDTH, task.WIDTH, bias=False)

    def forward(self, x):
        q, k, v = (
            heads.unflatten(-1, (task.HEADS, -1)).transpose(1, 2)
            for heads in self.qkv(self.mixer_norm(x)).split(task.WIDTH, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(task.VOCABULARY, task.WIDTH)
        self.position = nn.Embedding(task.LENGTH, task.WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(task.LAYERS))
        self.final_norm = nn.LayerNorm(task.WIDTH, bias=False)

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.final_norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Training:
    """A model, its optimizer, and how many steps it has done."""

    def __init__(self, compiled: bool):
        model = Model()
        _load(model)
        self.parameters = list(model.parameters())
        matrices = [p for p in self.parameters if p.ndim > 1]
        scales = [p for p in self.parameters if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": task.WEIGHT_DECAY},
                {"params": scales, "weight_decay": 0.0},
            ],
            lr=task.LEARNING_RATE,
            betas=task.BETAS,
            fused=True,
        )
        self.model = torch.compile(model) if compiled else model
        self.steps = 0

    def run(self, steps: int) -> list[float]:
        """Losses of so many further steps."""
        losses = []
        for _ in range(steps):
            tokens, targets = (torch.from_numpy(x).long() for x in task.batch(self.steps))
            loss = self.model(tokens, targets)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, task.CLIP_NORM)
            self.optimizer.step()
            losses.append(loss.detach())
            self.steps += 1
        return [loss.item() for loss in losses]

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)


@torch.no_grad()
def _load(model: Model) -> None:
    weights = {name: torch.from_numpy(x) for name, x in task.weights().items()}
    model.embedding.weight.copy_(weights["embedding"])
    model.position.weight.copy_(weights["position"])
    for i, layer in enumerate(model.layers):
        of_layer = {name: weights[f"{i}/{name}"].T for name in task.MATRICES}
        layer.qkv.weight.copy_(torch.cat([of_layer[name] for name in ("query", "key", "value")]))
        for name in ("out", "up", "down"):
            getattr(layer, name).weight.copy_(of_layer[name])


def programs(compiled: bool) -> dict:
    training = Training(compiled)
    return {
        "compare": lambda: training.run(task.COMPARED),
        "resume": lambda: training.run(1),
        "train": lambda: training.run(task.STEPS),
        "parameters": training.num_parameters,
    }


if __name__ == "__main__":
    serve(programs({"eager": False, "compiled": True}[sys.argv[1]]))
