"""Generation: a model's decode state, how the next token is drawn, and the loop that draws one after the other.

result = effjax.serving.generate(model, variables, [prompt], max_new_tokens=64)
"""

from effjax.serving.decoding import Rows, advance, begin
from effjax.serving.depthwise_generation import DepthwiseGeneration, generate_depthwise
from effjax.serving.early_exit import early_exit
from effjax.serving.generation import Generation, Step, generate, stream
from effjax.serving.sampling import Sampling
from effjax.serving.speculative_generation import Speculation, speculate
from effjax.serving.text import text_pieces

__all__ = [
    "DepthwiseGeneration",
    "Generation",
    "Rows",
    "Sampling",
    "Speculation",
    "Step",
    "advance",
    "begin",
    "early_exit",
    "generate",
    "generate_depthwise",
    "speculate",
    "stream",
    "text_pieces",
]
