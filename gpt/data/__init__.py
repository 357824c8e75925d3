"""From text to batches: source -> documents -> token files on disk -> sequences.

    sources/        where documents come from: files, token files, the hub
    tokenizer.py    text to token ids and back
    preparation.py  documents -> token files in a cache folder, once; `prepare(config)`
    cache.py        which cache folder belongs to a config, and what is read to fill it
    build.py        filling it, in steps that can be interrupted
    vocabulary.py   training a tokenizer on the corpus
    split.py        training or validation, for each document
    encode.py       encoding on all cores, in order
    prepared.py     what a prepared folder contains, verified
    token_files.py  token files written by other programs
    sequences.py    token files -> batches, a pure function of (seed, step)

`python -m gpt.data CONFIG.yaml` prepares the data of a config and describes it.
"""
