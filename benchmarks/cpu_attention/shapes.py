"""The shapes, which both sides read: [batch, time, heads, head_dim], causal, float32."""

SHAPES = {
    "[8, 256, 6, 64]": (8, 256, 6, 64),
    "[2, 2048, 8, 64]": (2, 2048, 8, 64),
}
# Runs a turn, so that a turn is a good part of a second.
RUNS = {"[8, 256, 6, 64]": 20, "[2, 2048, 8, 64]": 2}
