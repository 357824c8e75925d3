"""Running the cells: tasks -> an engine -> run directories.

tasks.py     which cells are trained together
runner.py    tasks -> run directories, by any engine: records how each cell ended
engines.py   the table of engines
engine.py    what every engine does
local.py     an engine: processes on this machine
ray.py       an engine: a Ray cluster
slurm.py     an engine: array jobs of Slurm
remote.py    a task on another machine: its checks, progress, and when to stop
worker.py    what the process of any engine does with a task
cell_runs.py a cell on disk: its directory, whether it has a result, and if not, why
"""
