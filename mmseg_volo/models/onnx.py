"""An exported ONNX file in the place of a segmentor's network.

Windows, test-time augmentation and metrics around the network stay as they are.
"""

import copy
import importlib.util
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor

from ..errors import CheckpointError, ConfigError

STEP = 16  # height and width of dynamic inputs are multiples of this
METADATA_KEY = 'mmseg_volo'
COARSE = 'coarse_logits'  # the output with the logits of the decode head, before they are upsampled
# Options that a file fixes when it is exported, or that only PyTorch has.
SETTLED = 'precision', 'compile', 'channels_last', 'cuda_graph'
Run = Callable[[np.ndarray], list[np.ndarray]]


def is_onnx(checkpoint: object) -> bool:
    """Whether this names an ONNX file, by its suffix."""
    return str(checkpoint).lower().endswith('.onnx')


def with_onnx(config: Config, path: str, device: str = 'cpu') -> tuple[Config, dict]:
    """The config of a segmentor whose network is an ONNX file.

    A file of one input size gets windows of that size, where the config has others.

    Args:
        config: the one that the file was exported with; it is not changed.
        path: of the file.
        device: 'cpu', 'cuda', 'cuda:1', ...

    Returns:
        The config, and the file's content as a checkpoint has it; see :class:`OnnxNetwork`.

    Raises:
        CheckpointError, ConfigError, FileNotFoundError: see :func:`open_onnx`.
    """
    content = _as_checkpoint(open_onnx(path, device)[1], path)
    about = content['meta']['exported']
    config = copy.deepcopy(config)
    model = config.model
    model.backbone = dict(type='OnnxNetwork', path=str(path), device=str(device))
    model.neck = model.auxiliary_head = model.pretrained = None
    model.decode_head = dict(
        type='OnnxHead',
        num_classes=len(about['classes']),
        out_channels=about['out_channels'],
        threshold=about['threshold'],
        align_corners=about['align_corners'],
    )
    test_cfg = {k: v for k, v in (model.get('test_cfg') or {}).items() if k not in SETTLED}
    if about['size']:
        size = tuple(about['size'])
        if test_cfg.get('mode') != 'slide' or tuple(test_cfg['crop_size']) != size:
            stride = tuple(-(-side * 2 // 3) for side in size)
            test_cfg.update(mode='slide', crop_size=size, stride=stride)
            print_log(
                f'{path} takes {size[0]} x {size[1]} pixels: images are predicted in windows of this size at a '
                f'stride of {stride[0]} x {stride[1]}; a file exported with --dynamic follows the config',
                logger='current',
            )
    model.test_cfg = test_cfg
    return config, content


def _as_checkpoint(about: dict, path: str | Path) -> dict:
    """What the file says of itself, in the form of a checkpoint without weights."""
    state = OrderedDict()
    state._metadata = {'': dict(source=str(path))}
    dataset_meta = dict(classes=about['classes'], palette=about['palette'])
    return dict(state_dict=state, meta=dict(dataset_meta=dataset_meta, exported=about))


def check_packages(*names: str) -> None:
    """Raise ConfigError where one of these packages, of the extra ``export``, is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f'ONNX needs {", ".join(missing)}: pip install -e ".[export]" in the clone')


def open_onnx(path: str | Path, device: str = 'cpu', threads: int = 0) -> tuple[Run, dict]:
    """Open an ONNX file: a function from an input to its two outputs, and what the file says of itself.

    Args:
        path: written by ``tools/export.py``.
        device: 'cpu', 'cuda', 'cuda:1', ...; the latter need onnxruntime-gpu.
        threads: for each image; by default as many as PyTorch has.

    Raises:
        ConfigError: onnxruntime is not installed, or not for this device.
        CheckpointError: another file.
        FileNotFoundError: no file.
    """
    check_packages('onnxruntime')
    import onnxruntime

    if not Path(path).is_file():
        raise FileNotFoundError(f'{path} does not exist')
    device = torch.device(device)
    provider = 'CUDAExecutionProvider' if device.type == 'cuda' else 'CPUExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(f'onnxruntime here has no {provider}: pip install onnxruntime-gpu, or take --device cpu')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    providers = [(provider, {'device_id': device.index or 0})] if device.type == 'cuda' else [provider]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a class of its own for each reason
        raise CheckpointError(f'{path} is no ONNX file, or broken: {str(error).splitlines()[0]}') from error
    text = session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
    if text is None:
        raise CheckpointError(f'{path} was not written by tools/export.py: it does not say what classes it has')
    about = json.loads(text)
    names = [about['output'], COARSE]

    def run(image: np.ndarray, names: list[str] = names) -> list[np.ndarray]:
        return session.run(names, {'image': image})

    return run, about


@MODELS.register_module()
class OnnxNetwork(BaseModule):
    """Backbone and decode head in an ONNX file, run by onnxruntime.

    Takes normalised images (B, 3, H, W). An image whose size the file does not take is padded with zeros at the right
    and the bottom. Returns the logits of the decode head, ((B, C, h, w),).

    Args:
        path: of a file written by ``tools/export.py``.
        device: where onnxruntime runs it.

    Attributes:
        content: the file as a checkpoint: no weights, and ``meta`` with ``dataset_meta`` (``classes``, ``palette``) and
            ``exported`` (size, precision and what else ``tools/export.py`` notes).
    """

    def __init__(self, path: str, device: str = 'cpu'):
        super().__init__()
        self.path, self.device = path, device
        self._run, self._about = open_onnx(path, device)
        self.content = _as_checkpoint(self._about, path)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        size = tuple(x.shape[2:])
        padded = self._about['size'] or [max(-(-side // STEP), 2) * STEP for side in size]
        if any(side > limit for side, limit in zip(size, padded, strict=True)):
            raise ValueError(f'{self.path} takes images of {padded[0]} x {padded[1]} pixels, got {size[0]} x {size[1]}')
        image = F.pad(x.float(), (0, padded[1] - size[1], 0, padded[0] - size[0]))
        if self._about['preprocess']:
            image = self._raw(image)
        (coarse,) = self._run(np.ascontiguousarray(image.cpu().numpy()), [COARSE])
        rows, columns = (-(-side * of // limit) for side, of, limit in zip(size, coarse.shape[2:], padded, strict=True))
        return (torch.from_numpy(coarse[:, :, :rows, :columns]).to(x.device),)

    def _raw(self, image: Tensor) -> Tensor:
        """Undo the normalisation, (B, H, W, 3), BGR, uint8: the file does it itself."""
        mean, std = (image.new_tensor(self._about[name]).view(3, 1, 1) for name in ('mean', 'std'))
        raw = (image * std + mean).round().clamp(0, 255).to(torch.uint8)
        if self._about['swap']:
            raw = raw.flip(1)
        return raw.permute(0, 2, 3, 1)


@MODELS.register_module()
class OnnxHead(BaseDecodeHead):
    """Return the logits of :class:`OnnxNetwork`; mmseg treats them as those of any head."""

    def __init__(self, num_classes: int, out_channels: int, threshold: float | None, align_corners: bool):
        super().__init__(
            in_channels=1,
            channels=1,
            num_classes=num_classes,
            out_channels=out_channels,
            threshold=threshold,
            align_corners=align_corners,
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0]
