"""The operation in models that have outlook attention of their own, against what these compute themselves."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from timm.models.volo import VOLO as TimmVOLO
from timm.models.volo import OutlookAttention
from torch import nn

from mmseg_volo.ops import use_fused_outlook

SMALL = dict(layers=(1, 1, 1, 1), embed_dims=(48, 96, 96, 96), num_heads=(2, 4, 4, 4), mlp_ratio=2.0)


class MiVOLO(TimmVOLO):
    """As in WildChlamydia/MiVOLO: timm's VOLO on six channels, for face and body, with outputs for age and gender."""

    def __init__(self):
        super().__init__(**SMALL, in_chans=6, num_classes=3, img_size=64)


SLOW_MIVOLO = pytest.param(MiVOLO, marks=pytest.mark.slow)


def volo(**more) -> TimmVOLO:
    torch.manual_seed(0)
    return TimmVOLO(**{**SMALL, **dict(num_classes=5, img_size=64), **more})


def test_a_timm_model_computes_the_same():
    model = timm.create_model('volo_d1_224').eval()
    image = torch.randn(2, 3, 224, 224)
    names = list(model.state_dict())
    with torch.no_grad():
        before = model(image)
        assert use_fused_outlook(model) == 4
        after = model(image)
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        assert list(model.state_dict()) == names
        assert use_fused_outlook(model) == 4  # a second time is no fault
        assert use_fused_outlook(model, False) == 0
        assert torch.equal(model(image), before)


@pytest.mark.parametrize('make', [volo, SLOW_MIVOLO])
def test_gradients_in_training(make):
    model = make().train()
    other = copy.deepcopy(model)
    use_fused_outlook(other)
    image = torch.randn(2, model.patch_embed.conv[0].in_channels, 64, 64)
    for one in (model, other):
        torch.manual_seed(0)  # for token labels' boxes
        one.mix_token = False
        out = one(image)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
    for (name, one), other_one in zip(model.named_parameters(), other.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(
                other_one.grad, one.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f'{n}: {m}'
            )


def test_copies_and_files():
    model = volo().eval()
    use_fused_outlook(model)
    image = torch.randn(1, 3, 64, 64)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        expected = model(image)
        nn.init.zeros_(model.network[0][0].attn.v.weight)  # the copies have weights of their own
        for one in (copied, loaded):
            assert torch.equal(one(image), expected) and not torch.equal(model(image), expected)


def test_dropped_weights_and_own_code_stay():
    """Attention dropout has no fused form; a subclass with a forward of its own is not touched."""
    attention = OutlookAttention(48, 2, stride=2, attn_drop=0.5).train()
    model, x = nn.Sequential(attention), torch.randn(1, 8, 8, 48)
    torch.manual_seed(0)
    before = model(x)
    assert use_fused_outlook(model) == 1
    torch.manual_seed(0)
    assert torch.equal(model(x), before)

    class Own(OutlookAttention):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match='has no OutlookAttention'):
        use_fused_outlook(nn.Sequential(Own(48, 2)))


@pytest.mark.slow
def test_torch_compile():
    model = volo().eval()
    use_fused_outlook(model)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('dynamo', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('make', [volo, SLOW_MIVOLO])
def test_onnx_of_opset_17_with_any_batch_has_no_col2im(make, dynamo):
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    model = make().eval()
    use_fused_outlook(model)
    images = torch.randn(3, model.patch_embed.conv[0].in_channels, 64, 64)
    with torch.no_grad():
        expected = model(images)
    options = dict(dynamic_axes=dict(x={0: 'batch'}), opset_version=17)
    if dynamo:
        options = dict(dynamic_shapes=({0: torch.export.Dim('batch')},), opset_version=18)
    file = io.BytesIO()
    program = torch.onnx.export(
        model, (images[:2],), None if dynamo else file, input_names=['x'], dynamo=dynamo, **options
    )
    if dynamo:
        program.save(file)
    graph = onnx.load_from_string(file.getvalue())
    assert not {'Col2Im', 'Im2Col'} & {node.op_type for node in graph.graph.node}
    session = runtime.InferenceSession(file.getvalue(), providers=['CPUExecutionProvider'])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_needs_torch_alone():
    """Without mmengine, mmcv and mmseg, the operation is there, and the rest names what it needs."""
    names = 'mmengine', 'mmcv', 'mmseg', 'timm', 'cv2', 'numba', 'av', 'scipy', 'matplotlib'
    code = f"""
import sys
sys.modules.update(dict.fromkeys({names}))
import torch
from mmseg_volo.ops import outlook_attention, use_fused_outlook
out = outlook_attention(torch.ones(1, 4, 4, 8), torch.zeros(1, 4, 4, 2, 9, 9), scale=1.0)
print(tuple(out.shape))
import mmseg_volo
try:
    mmseg_volo.VOLO
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert '(1, 4, 4, 8)' in done.stdout and 'mmseg_volo.VOLO needs mmengine, mmcv, mmseg' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('make', [volo, MiVOLO])
def test_openvino(make):
    openvino = pytest.importorskip('openvino')
    model = make().eval()
    use_fused_outlook(model)
    images = torch.randn(3, model.patch_embed.conv[0].in_channels, 64, 64)
    with torch.no_grad():
        expected = model(images)
    converted = openvino.convert_model(model, example_input=images[:2])
    compiled = openvino.Core().compile_model(converted, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    torch.testing.assert_close(torch.from_numpy(compiled(images.numpy())[0]), expected, rtol=1e-4, atol=1e-4)
