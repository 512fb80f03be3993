"""Write ONNX and torch.export files with their metadata, and open the torch.export files written here."""

import json
import logging
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim

from ..errors import CheckpointError, ConfigError
from ..models.onnx import COARSE, STEP, Run
from ..models.runtimes import METADATA_KEY
from ..utils.files import sha256
from .network import ExportNetwork

FORMATS = {'onnx': '.onnx', 'pt2': '.pt2'}
OPSET = 17
_LARGEST = 1024  # largest height and width, in multiples of STEP
_NEW_IN_18 = {'Resize': {'antialias': 0, 'keep_aspect_ratio_policy': b'stretch'}}  # attributes and their defaults


def trace(network: ExportNetwork, size: tuple[int, int], dynamic: bool) -> torch.export.ExportedProgram:
    """Trace the network to one graph with an open batch size.

    Args:
        network: the network.
        size: (height, width) of the input. With ``dynamic`` an example: two different multiples of :data:`STEP`.
        dynamic: leave height and width open.
    """
    # A batch of 2: the tracer takes sizes of 0 and 1 for constants.
    shape = (2, *size, 3) if network.preprocess else (2, 3, *size)
    image = torch.zeros(shape, dtype=torch.uint8 if network.preprocess else torch.float32)
    axes = {0: Dim('batch', min=1, max=4096)}
    if dynamic:
        first = 1 if network.preprocess else 2
        axes[first], axes[first + 1] = (STEP * Dim(name, min=2, max=_LARGEST) for name in ('height_16', 'width_16'))
    with torch.no_grad(), _quiet():
        return torch.export.export(network, (image,), dynamic_shapes=dict(image=axes), strict=False)


def write_onnx(program: torch.export.ExportedProgram, network: ExportNetwork, about: dict, path: Path) -> None:
    """Write an ONNX file of opset 17 with its weights.

    Raises:
        ConfigError: the model is too large for one file.
    """
    import onnx

    with torch.no_grad(), _quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=18,
            input_names=['image'],
            output_names=[network.output, COARSE],
            verbose=False,
        )
    model = made.model_proto
    # torch writes opset 18 or newer. From 17 to 18 the operators of this network only gained inputs and attributes. The
    # file keeps the old meaning: onnx.checker compares each node with the definitions of opset 17.
    for opset in model.opset_import:
        if opset.domain in ('', 'ai.onnx'):
            opset.version = OPSET
    for node in model.graph.node:
        new = _NEW_IN_18.get(node.op_type, {})
        for attribute in list(node.attribute):
            if attribute.name in new and onnx.helper.get_attribute_value(attribute) == new[attribute.name]:
                node.attribute.remove(attribute)
    _name_axes(model, network.preprocess)
    _reorder_gelu(model)
    model.ir_version = min(model.ir_version, 8)  # the IR version of opset 17
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(about))
    model.producer_name, model.producer_version = 'mmseg_volo', about['mmseg_volo']
    if model.ByteSize() >= 2**31:
        raise ConfigError(
            f'the model has {model.ByteSize() / 2**30:.1f} GiB, an ONNX file at most 2; export it with --precision fp16'
        )
    onnx.save(model, str(path))


def _name_axes(model: Any, channels_last: bool) -> None:
    """Give the open axes of inputs and outputs names in place of torch's numbers."""
    del model.graph.value_info[:]  # these use the numbers too; onnx.shape_inference infers them again
    for value in [*model.graph.input, *model.graph.output]:
        names = ['batch', None, 'height', 'width']
        if value.name == 'image' and channels_last:
            names = ['batch', 'height', 'width', None]
        elif value.name == 'classes':
            names = ['batch', 'height', 'width']
        elif value.name == COARSE:
            names = ['batch', None, 'coarse_height', 'coarse_width']
        for axis, name in zip(value.type.tensor_type.shape.dim, names, strict=True):
            if axis.dim_param:
                axis.dim_param = name


def _reorder_gelu(model: Any) -> None:
    """Turn x * (0.5 * (1 + erf(x / sqrt(2)))) into (x * (1 + erf(x / sqrt(2)))) * 0.5, with the same values.

    ONNX Runtime replaces the second form by one operator (onnxruntime/core/optimizer/gelu_fusion.cc), not the first.
    """
    from onnx import numpy_helper

    scalars = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer if not i.dims}
    made_by = {output: node for node in model.graph.node for output in node.output}

    def is_a(name: str, *kinds: str) -> bool:
        """Whether a tensor is made by a node of the first kind, whose first input is made by the second, ..."""
        node = made_by.get(name)
        return not kinds or (node is not None and node.op_type == kinds[0] and is_a(node.input[0], *kinds[1:]))

    for node in model.graph.node:
        if node.op_type == 'Mul' and is_a(node.input[1], 'Mul'):
            inner, x = made_by[node.input[1]], node.input[0]
            half, one_plus_erf = inner.input
            if scalars.get(half) == 0.5 and is_a(one_plus_erf, 'Add', 'Erf'):
                inner.input[0], node.input[0], node.input[1] = x, inner.output[0], half


def write_pt2(program: torch.export.ExportedProgram, about: dict, path: Path) -> str:
    """Write a file that :func:`torch.export.load` reads; returns its SHA-256 for :func:`open_pt2`."""
    with path.open('wb') as file:
        torch.export.save(program, file, extra_files={f'{METADATA_KEY}.json': json.dumps(about)})
    return sha256(path)


def open_pt2(path: str | Path, digest: str) -> Run:
    """Open a file that this process wrote, on the CPU; see :func:`~mmseg_volo.models.onnx.open_onnx`.

    :func:`torch.export.load` runs code that a crafted file holds, so no file from elsewhere is opened.

    Args:
        path: the file.
        digest: what :func:`write_pt2` returned for it.

    Raises:
        CheckpointError: the file was changed since it was written.
    """
    if sha256(path) != digest:
        raise CheckpointError(f'{path}: refused, because it is not the file that was written')
    module = torch.export.load(str(path)).module()

    @torch.no_grad()
    def run(image: np.ndarray) -> list[np.ndarray]:
        outputs: tuple[Tensor, ...] = module(torch.from_numpy(image))
        return [output.numpy() for output in outputs]

    return run


@contextmanager
def _quiet():
    """Silence the logs and warnings of the exporters; none of them is for users."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
