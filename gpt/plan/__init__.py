"""What a run will cost, and what size it should be, before anything is trained.

size.py counts parameters, memory and checkpoints; timing.py times a few updates; chinchilla.py and
budget.py find the model that a budget deserves; report.py puts it together.
"""

TOKENS_PER_PARAMETER = 20  # make the best use of compute; Hoffmann et al. 2022
USEFUL_EPOCHS = 4  # until then, repeated text is almost as good as new; Muennighoff et al. 2023
