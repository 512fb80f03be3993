"""Check that a device exists before it is used."""

import torch

from ..errors import ConfigError


def check_device(device: object) -> None:
    """Refuse a device that is not there; what does not name one passes.

    Raises:
        ConfigError: no kind of device has this name, or PyTorch cannot use this GPU.
    """
    if not isinstance(device, (str, int, torch.device)):
        return
    try:
        found = torch.device('cuda', device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r}: no such device; expected 'cpu', 'cuda', 'cuda:1', ...") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == 'cuda' and (found.index or 0) >= count:
        there = f"PyTorch can use {count}, 'cuda:0' first" if count else 'there is no GPU that PyTorch can use'
        raise ConfigError(f"device {found}: {there}; pass device='cpu'" + (' or another one' if count else ''))
