"""Training in several processes: torchrun's, or those that `--processes` starts.

    launch.py    starts the processes, and restarts them after a crash (torch's elastic launcher)
    group.py     the processes of a run: joining, messages from the first to the others, failures
    trainer.py   a trainer of which every process computes a share (DDP or FSDP2)
    sharding.py  whole tensors from FSDP2's shards, and back

The process of rank 0 leads. It alone reads data, writes files and talks to the user, by the same
code as a run in one process. The others follow: each waits for a message, such as "backward of
step 7", computes its share of that, and waits for the next. What was decided, and why, they need
not know: an evaluation, a rollback and the search for a failure need no code of their own here.
"""
