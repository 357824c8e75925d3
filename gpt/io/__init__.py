"""The program and its surroundings: terminal, files, text, and waiting for what may not answer.

console.py  what is printed, and progress
files.py    files written whole or not at all, and read only if they are regular
text.py     any text that comes in: its format, compression and encoding
wait.py     calls that may take for ever, open to Ctrl-C meanwhile
"""
