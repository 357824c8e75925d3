"""Diagnostics: statistics of each layer, and the cause of a divergence.

    layers.py      statistics of one update, one record per layer
    curvature.py   largest eigenvalues of the Hessian, alone and with Adam's preconditioner
    noise_scale.py the signal and the noise in the gradients of a batch
    fault.py       how a run diverged, as recorded in its result.json
    failure.py     where a diverged run first became non-finite, and what the literature suggests

`python -m gpt.diagnostics RUN_DIR` plots the statistics of a run, layer against step.
"""
