"""Speed and size, measured against peers on the machine at hand.

`python -m benchmarks.cpu` compares training and inference with PyTorch, `python -m benchmarks.startup` shows
what a user waits for (import, first fit, second run) and how much disk the library takes. Both print a table,
take `--json`, and keep what they measured under `benchmarks/results/`. See `common.py` for how time is taken.
"""
