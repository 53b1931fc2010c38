"""Where the network runs."""

import torch

from model.errors import UserError


def choose(name: str) -> torch.device:
    """Return the device of the setting `device`; auto takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: the device asked for is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }[device.type]
    if not there:
        raise UserError(f"device: {name} is not available on this machine; set device: auto")
    return device
