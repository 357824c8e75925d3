"""Watching runs: a table of all runs in a folder, and the curves of several in one picture.

    survey.py   finding runs, and how far each has come
    table.py    the table that `steadygpt runs` prints, and the options in which runs differ
    curves.py   the curves of runs as numbers
    picture.py  the picture of them that `steadygpt plot` draws

Everything is read from the files that training writes, also while it writes them. Nothing here
imports torch.
"""
