"""The stability comparison: grid -> runs -> verdicts -> statistics -> report.

comparison.py   the straight line through all of it
messages.py     what it prints
registration.py what was registered before the first result, and added later

grid.py         a YAML file -> arms, factors, seeds -> cells, each a config
estimate.py     tokens, FLOPs, time and disk before anything runs
tasks.py        which cells are trained together
runner.py       tasks -> run directories: the parent of the worker processes
worker.py       what a worker process does
cell_runs.py    a cell on disk: its directory, whether it has a result, why if not
reuse.py        cells copied from another comparison
probes.py       a network at initialization, without training
init_probes.py  the comparison's networks, probed: probes.json

verdicts.py     a run's metrics -> how it ended
outcomes.py     each cell's verdict, from its run directory
matching.py     whether the arms saw the same batches and started from the same weights
statistics.py   intervals, tests, thresholds: pure functions on numbers
results.py      the results as data: what summary.json holds
summary.py      outcomes -> results
wording.py      results -> sentences
figures/        the figures, by kind
report/         report.html, report.md and cells.csv
"""
