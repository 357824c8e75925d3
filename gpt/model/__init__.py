"""GPT-2: the network (gpt2.py) and each of its parts, with its variants."""
