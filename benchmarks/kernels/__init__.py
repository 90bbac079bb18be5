"""Every op of `pallas_kernels` beside the peer that a user would pick: `python -m benchmarks.kernels`; and a tuner.

| file | idea |
| --- | --- |
| `cases/` | shapes of each op, its implementations and their peers |
| `case` | what a case and a contender are; the programs that are measured |
| `timing` | median time on the device at hand |
| `bundles` | the schedule of a TPU kernel, read from the compiler's dump |
| `schedules`, `compile_schedules` | compiling for TPUs that are not here, in a process of its own |
| `roofline` | the least time that a chip allows |
| `report`, `plot`, `page` | table, picture, and the page of the static figures |
| `tune` | `python -m benchmarks.kernels.tune`: fills the tables of block sizes |
| `costs`, `search` | what a program costs with given sizes; where to look for better ones |
"""
