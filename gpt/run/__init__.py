"""A run: its directory, what happens between its steps, and how it recovers.

run.py        everything between the steps of a run, and its result
log.py        updates, read from the device and logged
directory.py  the files of a run
resume.py     how training starts in a directory: fresh, resumed, or ended
opening.py    restoring a run's state, and making its directory ready
recovery.py   rolling back, locating a failure, advising on memory
fallback.py   another directory for a run whose own cannot be written
cleanup.py    files that are no longer needed
loading.py    a trained model from its directory
banner.py     a summary of a config, before anything runs
cautions.py   warnings before anything runs
plot.py       loss.png, and what all plots share
layer_plot.py layers.png
notebook.py   how a notebook shows a result
"""
