"""The machine that trains.

device.py  which device, in which precision
memory.py  which micro-batch fits, and smaller ones when it does not
size.py    memory that a config needs, counted without building anything
"""
