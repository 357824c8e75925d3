"""The weights of a checkpoint, and the model that they are for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's weights into `model`.

    Raises:
        ValueError: they belong to another model, or have other dtypes.
    """
    for name, own in model.state_dict().items():
        if name in tensors and tensors[name].dtype != own.dtype:
            raise ValueError(f"{name}: its dtype is {tensors[name].dtype}, not {own.dtype}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[-1].strip()) from None
