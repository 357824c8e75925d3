"""Training in several processes: torchrun's, or those that `--processes` starts.

    lead.py      rank 0 trains, the others follow; whether several processes are faster than one
    group.py     the processes of a run: joining, messages from the first to the others, failures
    trainer.py   a trainer of which every process computes a share (DDP or FSDP2)
    sharding.py  whole tensors from FSDP2's shards, and back

gpt/cli/launch.py starts the processes, and restarts them after a crash (torch's elastic launcher).

The process of rank 0 leads. It alone reads data, writes files and talks to the user, by the same
code as a run in one process. The others follow: each waits for a message, such as "backward of
step 7", computes its share of that, and waits for the next. They need not
know what was decided, or why: a rollback and the search for a failure need no code of their own
here.
"""
