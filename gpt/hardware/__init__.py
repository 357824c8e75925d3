"""The machine and its memory.

size.py  the memory that a config needs, estimated without building a model
"""
