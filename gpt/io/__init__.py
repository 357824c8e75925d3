"""Input and output: terminal, files, text, and calls that may never return.

children.py  what processes inherit that this one starts
console.py   printing and progress
files.py     atomic writes, locks, checksums; reads regular files only
text.py      decodes UTF-8 text, plain or compressed, and recognizes other formats
wait.py      calls with a timeout, during which Ctrl-C works
"""
