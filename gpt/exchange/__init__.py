"""Import and export of weights and vocabularies: runs, and folders in the Hugging Face layout.

    pretrained.py    the weights that `init_from` names, checked before they are loaded
    exporting.py     a trained network as such a folder
    card.py          its model card

Which options and tensors correspond is in gpt/config/layouts.py.
"""
