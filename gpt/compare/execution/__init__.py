"""Running the cells: tasks -> worker processes -> run directories.

tasks.py     which cells are trained together
runner.py    tasks -> run directories: the parent of the worker processes
worker.py    what a worker process does
cell_runs.py a cell on disk: its directory, whether it has a result, why if not
"""
