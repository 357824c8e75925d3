"""Input and output: terminal, files, text, and calls that may never return.

console.py  printing and progress
files.py    atomic writes, locks, checksums; reads regular files only
text.py     text in any format, compression and encoding
wait.py     calls with a timeout, during which Ctrl-C works
"""
