"""The headline claims of the papers, at a small scale beside their baselines: `python -m benchmarks.claims`.

| file | idea |
| --- | --- |
| `claim` | what a claim is: how it is measured, and when it counts as reproduced |
| `bench` | where the runs of the claims are: their text, their folders, their lengths at equal FLOPs |
| `spread` | means and spreads over seeds, and differences from seed to seed |
| `copies` | bytes that a Pallas kernel copies between HBM and VMEM |
| `step_time` | training steps of several models timed in turn |
| `page`, `plot` | `docs/RESULTS.md` and its pictures |
| `catalogue` | every claim by its id; the others are one file each |

What was measured is kept in `benchmarks/results/claims/<id>.json`, and the page is made of these files alone, so that a
claim can be measured anew without the others. A run that has finished is not done again.
"""
