"""Learning tasks of the papers that this library goes back to, each a script: `python -m benchmarks.papers.adding`.

A script trains, tests on data that no training saw, prints what it found and writes `benchmarks/results/NAME.json`
and a picture. What is found is reported as it is, also where a cell fails. Seeds are set, so that a run on the same
library gives the same figures; times are the machine's.
"""
