"""A network's numbers as one flat vector, which is what travels between clients and server."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def get_params(module: nn.Module) -> Tensor:
    """Returns a copy of the trainable parameters, float32, shape (P,), in the order of `named_parameters`."""
    return _flatten(module, _trainable(module))


def set_params(module: nn.Module, params_P: Tensor) -> None:
    """Writes a vector of `get_params` into the trainable parameters.

    Raises:
        ValueError: If the vector's length is not the number of trainable parameters.
    """
    _unflatten(_trainable(module), params_P, "trainable parameters")


def get_buffers(module: nn.Module) -> Tensor:
    """Returns a copy of the floating-point buffers (running means and variances ...), float32, shape (Q,).

    Counters such as `num_batches_tracked` are whole numbers and stay where they are.
    """
    return _flatten(module, _floating_buffers(module))


def set_buffers(module: nn.Module, buffers_Q: Tensor) -> None:
    """Writes a vector of `get_buffers` into the floating-point buffers.

    Raises:
        ValueError: If the vector's length is not the number of buffer elements.
    """
    _unflatten(_floating_buffers(module), buffers_Q, "buffer elements")


def variances(module: nn.Module) -> Tensor:
    """Returns which elements of `get_buffers` are running variances, bool (Q,)."""
    named = [(name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point()]
    marks = [torch.full((buffer.numel(),), name.endswith("running_var")) for name, buffer in named]
    return torch.cat(marks) if marks else torch.zeros(0, dtype=torch.bool)


def shapes(module: nn.Module) -> list[torch.Size]:
    """Returns the shapes of the trainable parameters, in the order of `get_params`."""
    return [parameter.shape for parameter in _trainable(module)]


def num_params(module: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(parameter.numel() for parameter in _trainable(module))


def _trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for _, parameter in module.named_parameters() if parameter.requires_grad]


def _floating_buffers(module: nn.Module) -> list[Tensor]:
    return [buffer for _, buffer in module.named_buffers() if buffer.is_floating_point()]


def _flatten(module: nn.Module, tensors: Iterable[Tensor]) -> Tensor:
    rows = [tensor.detach().reshape(-1).to(torch.float32) for tensor in tensors]
    device = next((parameter.device for parameter in module.parameters()), None)
    return torch.cat(rows) if rows else torch.empty(0, device=device)


def _unflatten(tensors: list[Tensor], vector: Tensor, what: str) -> None:
    expected = sum(tensor.numel() for tensor in tensors)
    if vector.shape != (expected,):
        raise ValueError(f"a vector of shape {tuple(vector.shape)} does not fit {expected} {what}")
    with torch.no_grad():
        for tensor, part in zip(tensors, vector.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
