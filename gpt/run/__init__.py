"""A run: its directory and what is recorded there.

directory.py  what the directory holds, whether training may start in it, and reading it back
state.py      how far a run is: state.json of a checkpoint
metrics.py    metrics.jsonl
plan.py       what a config amounts to before anything runs
plot.py       loss.png and layers.png
"""
