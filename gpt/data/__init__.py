"""From text to batches: source -> documents -> token files on disk -> sequences.

    sources.py      where documents come from: files, the hub, token files
    preparation.py  documents -> token files in a cache folder, once; `prepare(config)`
    prepared.py     what such a folder holds, verified
    sequences.py    token files -> batches, a pure function of (seed, step)

`python -m gpt.data CONFIG.yaml` prepares a config's data and says what it found.
"""
