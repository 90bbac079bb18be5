"""Operations that a model needs, whatever a program spends: what model FLOPs utilisation is a part of.

The parts of a model count their own (`flops/spent`, forward, an input token); a backward pass takes twice as many, and
what is recomputed does not count (Chowdhery et al., "PaLM", arXiv 2204.02311, appendix B).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from effjax import models, registry
from effjax.ffn.experts import Experts
from effjax.ffn.mixture import MixtureOfExperts
from effjax.nn import scalars

# A backward pass multiplies twice where the forward pass multiplies once (arXiv 2001.08361, section 2.1).
TRAINING = 3.0


class EvenLoad(nn.Module):
    """Stands for a mixture of experts all of which, null ones too, are chosen equally often; computes nothing.

    Attributes:
      mixture: what it stands for.
    """

    mixture: MixtureOfExperts

    def flops_per_token(self, d_model: int) -> float:
        """Forward FLOPs of a token with as many true experts as tokens get on average, none of them dropped."""
        mixture = self.mixture
        expert = Experts(mixture.num_experts, mixture.hidden_dim, mixture.gated, parent=None)
        unused = mixture.choices - mixture.expected_experts
        return mixture.flops_per_token(d_model) - unused * expert.flops_per_row(d_model)

    def __call__(self, x, *, mask=None, train=False):
        return x, scalars.flops(self.flops_per_token(x.shape[-1]))


def forward_flops_per_token(
    config: Mapping[str, Any], batch: Mapping[str, jax.ShapeDtypeStruct]
) -> float:
    """Forward FLOPs of an input token in training: tokens that skip a part do not pay for it.

    What a model spends follows from shapes alone once the load of its experts is even, so that nothing is computed.

    Args:
      config: a resolved config.
      batch: the types of a batch.
    """
    model = models.create(**config["model"]).at_step(0)
    if isinstance(model.ffn, MixtureOfExperts):
        model = model.clone(ffn=EvenLoad(model.ffn))
    objective = registry.build("objective", config["objective"])
    rows = {name: x.update(shape=(min(2, x.shape[0]), *x.shape[1:])) for name, x in batch.items()}
    tokens = next(x for name, x in rows.items() if name.endswith("tokens"))
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)

    def spent(variables, batch):
        _, metrics = objective(model, variables, batch, jax.random.key(0))
        return metrics["flops/spent"]

    # What the result does not depend on is neither moved nor computed; these zeros are one number each in memory.
    zeros = jax.tree.map(
        lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), (variables, rows)
    )
    return float(jax.jit(spent)(*zeros))


def positions(batch: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Places for input tokens in a batch, padding included."""
    return sum(x.size for name, x in batch.items() if name.endswith("segment_ids"))
