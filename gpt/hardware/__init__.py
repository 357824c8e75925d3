"""The machine: what fits it.

size.py  memory that a config needs, counted without building anything
"""
