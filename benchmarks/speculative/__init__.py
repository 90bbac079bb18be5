"""Tokens a second with and without a draft, and how many drafts stay: `python -m benchmarks.speculative`.

A draft pays where a pass over a few tokens takes about as long as one over a single token. On a CPU it does not at
batch 1: XLA multiplies a matrix by one vector at the speed of memory, and by two to eight about four times slower, as
it rearranges the matrix first. There a draft has to give more than four tokens a pass to gain anything. At batch 8 the
single tokens of the rows pay for that too, and a good draft is worth more.
"""
