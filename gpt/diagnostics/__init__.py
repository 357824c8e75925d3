"""What the network is doing inside, layer by layer.

    layers.py    measures of one update, a record for each layer
    failure.py   where a diverged run first went wrong, and what the literature would try next

`python -m gpt.diagnostics RUN_DIR` draws a run's measures, layer against step.
"""
