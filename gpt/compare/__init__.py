"""The stability comparison: grid -> runs -> verdicts -> statistics -> report.

comparison.py   the straight line through all of it
messages.py     what it prints
registration.py what was registered before the first result, and added later
reuse.py        cells copied from another comparison

grid.py         a YAML file -> arms, factors, seeds -> cells, each a config
estimate.py     tokens, FLOPs, time and disk before anything runs
probes.py       a network at initialization, without training
init_probes.py  the comparison's networks, probed: probes.json

execution/      cells -> worker processes -> run directories
analysis/       run directories -> verdicts -> statistics -> sentences
figures/        the figures, by kind
report/         report.html, report.md and cells.csv
"""
