"""Check that a device exists before it is used."""

import torch

from ..errors import ConfigError


def check_device(device: object) -> None:
    """Check that a device exists; arguments that do not name a device pass.

    Raises:
        ConfigError: the name is unknown, or PyTorch cannot use this GPU.
    """
    if not isinstance(device, (str, int, torch.device)):
        return
    try:
        found = torch.device('cuda', device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device {device!r} is unknown; expected 'cpu', 'cuda', 'cuda:1', ...") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.type == 'cuda' and (found.index or 0) >= count:
        there = f"PyTorch finds {count} GPU(s), starting with 'cuda:0'" if count else 'PyTorch finds no GPU'
        raise ConfigError(f"device {found}: {there}; pass device='cpu'" + (' or another one' if count else ''))
