"""A run: its directory and what is recorded there.

directory.py  what the directory contains, whether training may start in it, reading it back
state.py      progress of a run: state.json of a checkpoint
metrics.py    metrics.jsonl
plan.py       parameters, FLOPs, memory and time of a config, before anything runs
plot.py       loss.png and layers.png
"""
