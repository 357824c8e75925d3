"""From text to batches: source -> documents -> token files on disk -> sequences.

    sources/        where documents come from: files, other programs' token files, the hub
    tokenizer.py    text to token ids and back
    preparation.py  `prepare(config)`: documents -> token files in a cache folder, once
    cache.py        which cache folder belongs to a config, and what is read to fill it
    build.py        filling it, in steps that can be interrupted
    vocabulary.py   training a tokenizer on the corpus
    split.py        training or validation, for each document
    encode.py       encoding on all cores, in order
    token_files.py  the ids, and what a token file contains
    prepared.py     the folder with its meta.json, written, verified and opened
    sequences.py    token files -> batches, a pure function of (seed, step)

`python -m gpt.data CONFIG.yaml` prepares the data of a config and describes it.
"""
