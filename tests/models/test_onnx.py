"""ONNX files with odd metadata end in one CheckpointError."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from small_models import segmentor_config

from mmseg_volo import init_model
from mmseg_volo.errors import CheckpointError, ConfigError
from mmseg_volo.models.onnx import open_onnx, use_runtime

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
ABOUT = dict(
    mmseg_volo='0.1',
    output='logits',
    precision='fp32',
    size=None,
    preprocess=False,
    mean=[1.0, 2.0, 3.0],
    std=[1.0, 1.0, 1.0],
    classes=['a', 'b', 'c'],
    palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2]],
    out_channels=3,
    align_corners=False,
    threshold=None,
    swap=True,
)


def write(path: Path, metadata: str | None, outputs: tuple[str, ...] = ('logits', 'coarse_logits')) -> Path:
    """A network that returns its image as logits."""
    axes = ['n', 3, 'h', 'w']
    value = lambda name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes)  # noqa: E731
    nodes = [onnx.helper.make_node('Identity', ['image'], [name]) for name in outputs]
    graph = onnx.helper.make_graph(nodes, 'g', [value('image')], [value(name) for name in outputs])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    if metadata is not None:
        onnx.helper.set_model_props(model, dict(mmseg_volo=metadata))
    onnx.save(model, str(path))
    return path


@pytest.fixture(params=['onnxruntime', 'openvino'])
def config(request) -> Config:
    pytest.importorskip(request.param)
    model = segmentor_config(classes=3, test_cfg=dict(mode='whole', runtime=request.param))
    return Config(dict(default_scope='mmseg', model=model.to_dict()))


def test_metadata_of_the_export_is_accepted(config, tmp_path):
    model = init_model(config, write(tmp_path / 'x.onnx', json.dumps(ABOUT)), 'cpu')
    assert model.dataset_meta == dict(classes=ABOUT['classes'], palette=ABOUT['palette'])
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(image), image)


@pytest.mark.parametrize('place', ['../secret', 'link', '{folder}/secret', '/etc/passwd', 'gone', ''])
def test_weights_in_files_outside_the_folder_are_not_read(config, tmp_path, place):
    (tmp_path / 'secret').write_bytes(bytes(12))
    (tmp_path / 'x').mkdir()
    (tmp_path / 'x/link').symlink_to(tmp_path / 'secret')
    path = write(tmp_path / 'x/x.onnx', json.dumps(ABOUT))
    model = onnx.load(path)
    weights = model.graph.initializer.add(name='weights', data_type=onnx.TensorProto.FLOAT, dims=[1, 3, 1, 1])
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key='location', value=place.format(folder=tmp_path))
    model.graph.node[0].CopyFrom(onnx.helper.make_node('Add', ['image', 'weights'], ['logits']))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(
        CheckpointError, match=r'x\.onnx is broken or not an ONNX file: .*([Ee]xternal|outside the base)'
    ) as refused:
        init_model(config, path, 'cpu')
    assert '\n' not in str(refused.value)


def test_odd_metadata(config, tmp_path):
    texts = [
        None,
        '',
        '3',
        '[]',
        'null',
        '"a"',
        '{',
        '[' * 100_000,
        '{"a":' * 5000,
        '"' + 'a' * 2**21 + '"',
        '9' * 5000,
    ]
    draw = random.Random(0)
    odd = [3, -1, 2**70, 'abc', [], [1], {}, {'a': 1}, [['a']], [[1, 2]], None, True, 'NaN', [None] * 3, 1e400, '$(x)']
    wrong = [(key, value) for key in ABOUT if key not in ('mmseg_volo', 'precision') for value in odd]
    texts += [json.dumps({k: v for k, v in ABOUT.items() if k != key}) for key in ('classes', 'preprocess', 'size')]
    refused = 0
    for text in texts:
        with pytest.raises(CheckpointError, match=r'x\.onnx was not written by tools/export\.py: '):
            init_model(config, write(tmp_path / 'x.onnx', text), 'cpu')
    for key, value in draw.sample(wrong, 60):
        write(tmp_path / 'x.onnx', json.dumps({**ABOUT, key: value}))
        try:
            init_model(config, tmp_path / 'x.onnx', 'cpu')(torch.zeros(1, 3, 32, 32))
        except CheckpointError as error:
            assert str(error).endswith(f'{key} in its metadata is missing or wrong') or 'out_channels' in str(error)
            refused += 1
        except ValueError as error:  # a valid size, and an image of another
            assert key == 'size' and 'takes images of' in str(error)
    assert refused > 40


def test_other_outputs(config, tmp_path):
    for outputs in (('logits',), ('classes', 'coarse_logits'), ('a', 'b')):
        with pytest.raises(CheckpointError, match='it has other inputs or outputs'):
            init_model(config, write(tmp_path / 'x.onnx', json.dumps(ABOUT), outputs), 'cpu')
    five = dict(ABOUT, classes=list('abcde'), palette=[[i] * 3 for i in range(5)], out_channels=5)
    model = init_model(config, write(tmp_path / 'x.onnx', json.dumps(five)), 'cpu')
    with pytest.raises(CheckpointError, match=r'coarse_logits has the shape \(1, 3, 32, 32\), which does not fit'):
        model(torch.from_numpy(np.zeros((1, 3, 32, 32), np.float32)))


def test_wrong_runtimes(config, tmp_path):
    path = write(tmp_path / 'x.onnx', json.dumps(ABOUT))
    with pytest.raises(ConfigError, match='runtime must be one of onnxruntime, openvino, tensorrt'):
        open_onnx(path, runtime='ncnn')
    with pytest.raises(ConfigError, match='TensorRT runs on a GPU, not on cpu'):
        open_onnx(path, runtime='tensorrt')
    with pytest.raises(ConfigError, match=r'TensorRT cannot run here: (there is no GPU|onnxruntime has no Tensorrt)'):
        open_onnx(path, 'cuda', runtime='tensorrt')
    with pytest.raises(ConfigError, match=r'a\.pth is no \.onnx file'):
        use_runtime(config, 'a.pth', 'openvino')
    if config.model.test_cfg.runtime == 'openvino':
        with pytest.raises(ConfigError, match='OpenVINO runs on the CPU here, not on cuda'):
            open_onnx(path, 'cuda', runtime='openvino')
    (tmp_path / 'broken.onnx').write_bytes(b'no file')
    with pytest.raises(CheckpointError, match='is broken or not an ONNX file'):
        open_onnx(tmp_path / 'broken.onnx', runtime=config.model.test_cfg.runtime)
