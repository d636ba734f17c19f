"""Speed and size, measured against peers on the machine at hand.

`python -m benchmarks.cpu` compares training, inference, streaming and memory with other libraries, `python -m
benchmarks.options` shows what each option of a layer costs, `python -m benchmarks.startup` what a user waits for
(import, first fit, second run) and how much disk the library takes, `python -m benchmarks.ladder` how the LSTM kernel
became fast, rung by rung; `benchmarks.papers` has the learning tasks. All print a table, take `--json`, and keep what
they measured under `benchmarks/results/`. See `common.py` for how time is taken, `process.py` for where.
"""
