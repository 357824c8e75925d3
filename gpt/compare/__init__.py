"""The stability comparison: grid -> runs -> verdicts -> statistics -> report.

grid.py         a YAML file -> arms, factors, seeds -> cells, each a config
runner.py       cells -> run directories, in worker processes
verdicts.py     a run's metrics -> what became of it
statistics.py   intervals, tests, thresholds; pure functions on numbers
probes.py       networks at their start, without training
summary.py      all of it -> cells.csv, summary.json and the words of the verdict
figures.py      the pictures
report.py       report.html and report.md
"""
