"""Scaling studies: how the loss depends on model size, training tokens and compute.

ladder.py   the config: sizes and compute budgets -> a grid of runs, which gpt.compare runs
law.py      Chinchilla's parametric law, fitted to the runs
isoflop.py  the best size of each budget, from a parabola
study.py    from ladder to report
results.py  runs -> both fits and their intervals
report.py   the results in words and tables
figures.py  the results in pictures

A study is a comparison whose cells differ in model size and number of steps: the same grid, cells,
workers, directory and resuming, with another analysis.
"""
