"""Exported files against PyTorch and onnxruntime, broken files, and refused requests."""

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from small_models import ARCH
from small_runs import write_config

from mmseg_volo.errors import CheckpointError, ConfigError, ExportError
from mmseg_volo.export import checks, exporting, formats, network, quantization, tensorrt
from mmseg_volo.export.exporting import export_model
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
ROOT = Path(__file__).resolve().parents[2]
needs_torch = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split('.')[:2])) < exporting._LEAST_TORCH, reason='exporting needs a newer PyTorch'
)


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """Return (config, checkpoint) of a small model with random weights whose predictions have several classes."""
    folder = tmp_path_factory.mktemp('export')
    config = Config.fromfile(write_config(folder))
    torch.manual_seed(0)
    model = init_model(config, device='cpu')
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        model.backbone.pos_embed.normal_()
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), folder / 'small.pth')
    return config, str(folder / 'small.pth')


@pytest.fixture(scope='module')
def dynamic(small, tmp_path_factory):
    """Export the small model to an ONNX file for every size, from uint8 images to class ids."""
    path = str(tmp_path_factory.mktemp('dynamic') / 'small.onnx')
    export_model(*small, path, dynamic=True, output='classes', preprocess=True)
    return path


@pytest.fixture(scope='module')
def fixed(small, tmp_path_factory):
    """Export the small model to an ONNX file for 64 x 96 pixels that gives logits."""
    path = str(tmp_path_factory.mktemp('fixed') / 'small.onnx')
    export_model(*small, path, size=(64, 96))
    return path


def smooth_image(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8), (width, height))


@pytest.mark.parametrize('size', [1, 5, 7, 22, 33, 64])
def test_matrices_pool_and_resize_like_pytorch(size):
    line = torch.randn(1, 2, size)
    for out in (1, 2, 3, 6):
        torch.testing.assert_close(line @ network._pool(size, out).T, F.adaptive_avg_pool1d(line, out))
    for out in (1, 5, 14, 16, 33, 64):
        expected = F.interpolate(line[:, :, None], (1, out), mode='bicubic')[:, :, 0]
        torch.testing.assert_close(line @ network._cubic(size, out).T, expected, rtol=0, atol=1e-5)


@needs_torch
def test_dynamic_file_takes_any_size_and_batch(small, dynamic):
    session = onnxruntime.InferenceSession(dynamic, providers=['CPUExecutionProvider'])
    shapes = {value.name: value.shape for value in [*session.get_inputs(), *session.get_outputs()]}
    assert shapes['image'] == ['batch', 'height', 'width', 3] and shapes['classes'] == ['batch', 'height', 'width']
    predictor = Predictor(*small, 'cpu')
    for batch, height, width in ((1, 32, 32), (3, 64, 160), (2, 176, 48)):
        images = np.stack([smooth_image(height, width, seed) for seed in range(batch)])
        classes = session.run(['classes'], {'image': images})[0]
        assert classes.dtype == np.int32 and classes.shape == (batch, height, width)
        expected = np.stack([predictor.model.test_step(_data(i))[0].pred_sem_seg.data[0].numpy() for i in images])
        assert len(np.unique(expected)) > 3 and (classes == expected).mean() > 0.999


def _data(image):
    from mmseg.structures import SegDataSample

    meta = dict(ori_shape=image.shape[:2], img_shape=image.shape[:2])
    return dict(inputs=[torch.from_numpy(image).permute(2, 0, 1)], data_samples=[SegDataSample(metainfo=meta)])


@needs_torch
@pytest.mark.parametrize(
    ('mode', 'aug_test', 'runtime'),
    [
        ('whole', False, 'onnxruntime'),
        ('whole', True, 'onnxruntime'),
        ('slide', False, 'onnxruntime'),
        ('slide', True, 'onnxruntime'),
        ('whole', False, 'openvino'),
        ('slide', True, 'openvino'),
    ],
)
def test_predictor_accepts_the_file_as_checkpoint(small, dynamic, mode, aug_test, runtime):
    pytest.importorskip(runtime)
    config, checkpoint = Config(small[0].to_dict()), small[1]
    config.model.test_cfg = dict(mode='whole', runtime=runtime)
    if mode == 'slide':
        config.model.test_cfg.update(mode='slide', crop_size=(64, 64), stride=(43, 43))
    ours, files = (Predictor(config, path, 'cpu', aug_test, confidence=True) for path in (checkpoint, dynamic))
    assert files.classes == ours.classes and files.palette == ours.palette
    for height, width in ((64, 128), (77, 201), (150, 33)):  # the pipeline resizes them
        image = smooth_image(height, width)
        expected, found = (p.predict(p.prepare(image)) for p in (ours, files))
        assert len(np.unique(expected.classes)) > 2
        # The file gets images rounded to 8 bits, and the padding of zeros is the mean colour there.
        assert (found.classes == expected.classes).mean() > 0.99
        assert np.abs(found.confidence - expected.confidence).mean() < 0.01


@needs_torch
def test_openvino_computes_in_bfloat16_on_request(small, dynamic):
    openvino = pytest.importorskip('openvino')
    config = Config(small[0].to_dict())
    config.model.test_cfg = dict(mode='whole', runtime='openvino')
    full = Predictor(config, dynamic, 'cpu', confidence=True)
    asked = Predictor(config, dynamic, 'cpu', confidence=True, precision='bf16')
    for half in (asked, full.with_options(confidence=True, precision='bf16')):
        first, second = (p.predict(p.prepare(smooth_image(64, 128))) for p in (full, half))
        assert (first.classes == second.classes).mean() > 0.95
        has_bf16 = 'BF16' in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES')
        assert np.array_equal(first.confidence, second.confidence) != has_bf16
    with pytest.raises(ConfigError, match='precision: fixed when the ONNX file was exported'):
        full.with_options(precision='fp16')


@needs_torch
def test_file_of_one_size_predicts_in_windows_of_it(small, fixed):
    config, checkpoint = small
    windows = Config(config.to_dict())
    windows.model.test_cfg = dict(mode='slide', crop_size=(64, 96), stride=(43, 64))
    ours, files = Predictor(windows, checkpoint, 'cpu'), Predictor(config, fixed, 'cpu')
    for height, width in ((64, 128), (64, 96), (200, 200)):
        image = smooth_image(height, width)
        assert (files(image) == ours(image)).mean() > 0.999
    assert files(smooth_image(32, 300)).shape == (32, 300)  # lower than the window
    with pytest.raises(ConfigError, match='fixed when the ONNX file was exported'):
        files.with_options(precision='bf16')


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize('format', ['onnx', 'pt2'])
def test_half_precision(small, tmp_path, format):
    path = str(tmp_path / f'half.{format}')
    export_model(*small, path, format, size=(64, 64), precision='fp16')
    if format == 'onnx':
        kinds = {i.data_type for i in onnx.load(path).graph.initializer if len(i.dims) > 1}
        assert onnx.TensorProto.FLOAT not in kinds and onnx.TensorProto.FLOAT16 in kinds
    else:
        assert {p.dtype for p in torch.export.load(path).parameters()} == {torch.float16}


@pytest.mark.slow
@needs_torch
def test_int8_is_measured_and_refused_if_it_differs_too_much(small, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(quantization, 'print_log', lambda line, **_: said.append(line))
    path = tmp_path / 'int8.onnx'
    monkeypatch.setattr(quantization, 'LEAST_EQUAL', 0.8)  # random weights
    export_model(*small, str(path), dynamic=True, precision='int8')
    assert re.fullmatch(r'on 2 images \d\d\.\d\d% of the pixels .* mIoU \d+\.\d\d before, \d+\.\d\d after', said[0])
    about = next(p.value for p in onnx.load(path).metadata_props if p.key == 'mmseg_volo')
    assert json.loads(about)['precision'] == 'int8'
    before = path.read_bytes()
    monkeypatch.setattr(quantization, 'LEAST_EQUAL', 1.1)
    with pytest.raises(ExportError, match='the int8 file differs too much: on 2 images'):
        export_model(*small, str(path), dynamic=True, precision='int8')
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ['int8.onnx']
    config = Config(small[0].to_dict())
    config.train_dataloader.dataset = dict(type='CamVidDataset', data_root='nowhere', data_prefix=dict(img_path='x'))
    with pytest.raises(ConfigError, match='int8 is calibrated on images'):
        export_model(config, small[1], str(path), precision='int8')


@pytest.mark.slow
@needs_torch
def test_pt2_runs_without_this_package(small, tmp_path):
    path = str(tmp_path / 'small.pt2')
    export_model(*small, path, 'pt2', dynamic=True)
    about = {'mmseg_volo.json': ''}
    module = torch.export.load(path, extra_files=about).module()
    model = init_model(*small, 'cpu')
    assert json.loads(about['mmseg_volo.json'])['classes'] == list(model.dataset_meta['classes'])
    for shape in ((1, 3, 96, 64), (3, 3, 32, 80)):
        image = torch.randn(shape)
        logits = module(image)[0]
        with torch.no_grad():
            expected = F.interpolate(model(image), shape[2:], mode='bilinear')
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    # torch.export.load runs code in a crafted file: this package opens only what the same process wrote.
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert len(formats.open_pt2(path, digest)(np.zeros((1, 3, 32, 32), np.float32))) == 2
    with Path(path).open('ab') as file:
        file.write(b'x')
    with pytest.raises(CheckpointError, match='refused, because it is not the file that was written'):
        formats.open_pt2(path, digest)
    with pytest.raises(CheckpointError, match=r'small\.pt2: .*no checkpoint'):
        init_model(small[0], path, 'cpu')


@needs_torch
def test_operators_opset_and_metadata_of_the_file(small, fixed, dynamic):
    for path in (fixed, dynamic):
        operators = checks.check_onnx(Path(path))
        assert set(operators) <= tensorrt.OPERATORS and not {'Col2Im', 'ScatterND', 'Unfold'} & set(operators)
        model = onnx.load(path)
        assert {o.domain: o.version for o in model.opset_import} == {'': 17} and not model.functions
        about = json.loads(next(p.value for p in model.metadata_props if p.key == 'mmseg_volo'))
        assert about['classes'][0] == 'road' and len(about['palette']) == len(about['classes'])


@needs_torch
def test_onnxruntime_replaces_every_gelu_by_one_operator(fixed, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimized.onnx')
    onnxruntime.InferenceSession(fixed, options, providers=['CPUExecutionProvider'])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / 'optimized.onnx').graph.node)
    assert not kinds['Erf'] and kinds['Gelu'] + kinds['BiasGelu'] == 5  # the MLPs


@needs_torch
def test_int8(small, fixed, tmp_path, caplog):
    config, path = small[0], tmp_path / 'int8.onnx'
    images = [tmp_path / f'{i}.png' for i in range(6)]
    for i, image in enumerate(images):
        cv2.imwrite(str(image), smooth_image(64, 96, i))
    quantization.quantize(Path(fixed), path, config, images)
    assert checks.check_onnx(path, tensorrt=False)['DequantizeLinear'] > 30
    model = onnx.load(path)
    made_by = {output: node for node in model.graph.node for output in node.output}
    after, before = (
        {i.name: onnx.numpy_helper.to_array(i) for i in m.graph.initializer} for m in (model, onnx.load(fixed))
    )
    quantized = {}  # weights: the nearest of 255 levels for each output channel
    for node in model.graph.node:
        weights = made_by.get(node.input[1]) if node.op_type in ('Conv', 'MatMul') else None
        if weights is not None and weights.input[0] in after:
            name = weights.input[0].removesuffix('_quantized')
            quantized[name], scale = (after[one].astype(np.float64) for one in weights.input[:2])
            axis = 0 if node.op_type == 'Conv' else 1
            scale = scale.reshape([-1 if i == axis else 1 for i in range(quantized[name].ndim)])
            if name in before:
                assert np.all(np.abs(quantized[name] * scale - before[name]) <= 0.5001 * scale)
    assert sum(weight.size for weight in quantized.values()) > 0.85 * sum(weight.size for weight in before.values())
    predictors = [Predictor(config, p, 'cpu') for p in (fixed, str(path))]
    for image in images:
        first, second = (predictor(cv2.imread(str(image))) for predictor in predictors)
        assert (first == second).mean() > 0.9


def test_operators_that_tensorrt_does_not_support_are_named(tmp_path):
    def refused(*nodes, version=17, **shapes):
        inputs = [onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, [1, 1, 4, 4])]
        outputs = [onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [None] * 4)]
        graph = onnx.helper.make_graph(
            list(nodes), 'g', inputs, outputs, [onnx.numpy_helper.from_array(np.array([1, 1, 8, 8]), 's')]
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', version)], ir_version=8)
        onnx.save(model, str(tmp_path / 'x.onnx'))
        with pytest.raises(ExportError) as error:
            checks.check_onnx(tmp_path / 'x.onnx')
        return str(error.value)

    make = onnx.helper.make_node
    assert 'Resize in mode cubic' in refused(make('Resize', ['x', '', '', 's'], ['y'], mode='cubic'))
    assert 'Selu is not supported' in refused(make('Selu', ['x'], ['y']))
    assert 'operator sets' in refused(make('Relu', ['x'], ['y']), version=16)
    assert 'onnx.checker refuses' in refused(make('Relu', ['x'], ['y'], axis=3))


@needs_torch
def test_file_with_other_results_is_removed(small, fixed, tmp_path, monkeypatch):
    def write_wrong_bias(program, net, about, path):
        model = onnx.load(fixed)
        bias = next(i for i in model.graph.initializer if i.name.endswith('conv_seg.bias'))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.01, bias.name))
        onnx.save(model, str(path))

    monkeypatch.setattr(exporting, 'write_onnx', write_wrong_bias)
    with pytest.raises(ExportError, match=r'give different results .*logits differ by 1\.0e-02'):
        export_model(*small, str(tmp_path / 'out/small.onnx'), size=(64, 96))
    assert not list((tmp_path / 'out').iterdir())


def command(monkeypatch, *arguments):
    spec = importlib.util.spec_from_file_location('export_tool', ROOT / 'tools/export.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    module.main()


@needs_torch
def test_bad_requests_are_refused(small, tmp_path, monkeypatch):
    config, checkpoint = small
    path = tmp_path / 'config.py'
    config.dump(path)
    run = lambda *more: command(monkeypatch, path, *more)  # noqa: E731
    with pytest.raises(ConfigError, match=r'the name of a pt2 file must end with \.pt2'):
        run(checkpoint, '--format', 'pt2', '--out', tmp_path / 'x.onnx')
    with pytest.raises(ConfigError, match='VOLO needs 32 x 32'):
        run(checkpoint, '--out', tmp_path / 'x.onnx', '--size', 16, 64)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        run(tmp_path / 'none.pth', '--out', tmp_path / 'x.onnx')
    with pytest.raises(OSError, match='sealed'):
        (tmp_path / 'sealed').write_text('a file')
        run(checkpoint, '--out', tmp_path / 'sealed/x.onnx')
    other = torch.load(checkpoint, weights_only=False)
    other['state_dict'].pop('decode_head.conv_seg.weight')
    torch.save(other, tmp_path / 'other.pth')
    with pytest.raises(CheckpointError, match='not the weights'):
        run(tmp_path / 'other.pth', '--out', tmp_path / 'x.onnx')
    with pytest.raises(SystemExit):
        run(checkpoint, '--out', tmp_path / 'x.onnx', '--size', 64, 64, '--dynamic')
    with pytest.raises(ConfigError, match='--precision int8 is for ONNX files'):
        run(checkpoint, '--out', tmp_path / 'x.pt2', '--format', 'pt2', '--precision', 'int8')
    with pytest.raises(FileNotFoundError, match='nowhere'):
        run(checkpoint, '--out', tmp_path / 'x.onnx', '--precision', 'int8', '--calibrate', tmp_path / 'nowhere')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['config.py', 'other.pth', 'sealed']


def test_bad_files_are_refused(small, tmp_path):
    (tmp_path / 'empty.onnx').touch()
    with pytest.raises(CheckpointError, match='broken or not an ONNX file'):
        Predictor(small[0], str(tmp_path / 'empty.onnx'), 'cpu')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        Predictor(small[0], str(tmp_path / 'none.onnx'), 'cpu')
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in 'xy']
    graph = onnx.helper.make_graph([onnx.helper.make_node('Relu', ['x'], ['y'])], 'g', value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 17)], ir_version=8)
    onnx.save(model, str(tmp_path / 'foreign.onnx'))
    with pytest.raises(CheckpointError, match=r'not written by tools/export\.py'):
        Predictor(small[0], str(tmp_path / 'foreign.onnx'), 'cpu')


@needs_torch
def test_file_of_other_classes_is_refused(small, dynamic):
    config = Config(small[0].to_dict())
    config.test_dataloader.dataset.metainfo = dict(classes=[f'thing {i}' for i in range(19)])
    with pytest.raises(CheckpointError, match='other classes than the data set'):
        Predictor(config, dynamic, 'cpu')
    assert Predictor(config, dynamic, 'cpu', allow_mismatch=True).classes[0] == 'road'


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize('arch', ['d1', 'd2', 'd3', 'd4', 'd5'])
def test_all_variants(arch, tmp_path):
    config = Config.fromfile(ROOT / f'configs/volo_{arch}_ade20k.py')
    config.model.backbone.init_cfg = None
    model = init_model(config, device='cpu')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), tmp_path / 'model.pth')
    del model
    for name, more in dict(open=dict(dynamic=True), fixed=dict(size=(512, 512), precision='fp16')).items():
        export_model(config, str(tmp_path / 'model.pth'), str(tmp_path / f'{name}.onnx'), **more)


@pytest.mark.slow
@needs_torch
def test_other_backbones_and_heads(tmp_path):
    config = Config.fromfile(write_config(tmp_path))
    config.model.decode_head = dict(
        type='LeanFCNHead', in_channels=64, in_index=3, channels=16, num_classes=19, norm_cfg=dict(type='BN')
    )
    config.model.backbone.arch = ARCH
    model = init_model(config, device='cpu')
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    export_model(config, str(tmp_path / 'model.pth'), str(tmp_path / 'fcn.onnx'), dynamic=True)
