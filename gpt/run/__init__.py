"""A run: its directory, what happens between its steps, and how it recovers.

run.py        everything between the steps of a run, and its result
log.py        updates, read from the device, counted and logged
directory.py  the files of a run
resume.py     how training starts in a directory: fresh, resumed, or ended
opening.py    making a directory ready for training
recovery.py   rolling back, locating a failure, saving elsewhere
loading.py    a trained model from its directory
plan.py       a summary of a config, before anything runs
plot.py       loss.png and layers.png
"""
