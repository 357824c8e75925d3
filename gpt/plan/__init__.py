"""What a run will cost, and what size it should be, before anything is trained.

size.py counts parameters, memory and checkpoints; timing.py times a few updates; chinchilla.py and
budget.py find the model that a budget deserves; report.py puts it together.
"""
