"""Generation: a model's decode state, how the next token is drawn, and the loop that draws one after the other.

result = effjax.serving.generate(model, variables, [prompt], max_new_tokens=64)
"""

from effjax.serving.decoding import Rows, advance, begin
from effjax.serving.generation import Generation, Step, generate, stream
from effjax.serving.sampling import Sampling
from effjax.serving.text import text_pieces

__all__ = [
    "Generation",
    "Rows",
    "Sampling",
    "Step",
    "advance",
    "begin",
    "generate",
    "stream",
    "text_pieces",
]
