"""Segmentors small enough for tests, of any of mmseg's types, with the same weights where that is asked for."""

import torch
from mmengine.config import ConfigDict
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

import mmseg_volo  # noqa: F401

# Not 16 in the stem: oneDNN then gets the 4 x 4 projection wrong in bfloat16 on CPUs with AMX.
ARCH = dict(depths=(1, 1, 1, 1), dims=(32, 64, 64, 64), heads=(1, 2, 2, 2), mlp_ratios=2, stem_width=8)
BN = dict(type='BN', requires_grad=True)
SLIDE = dict(mode='slide', crop_size=(64, 96), stride=(43, 64))


def segmentor_config(
    type: str = 'StreamingEncoderDecoder',
    classes: int = 7,
    out_channels: int | None = None,
    head: str = 'UPerHead',
    **cfg,
) -> ConfigDict:
    """A segmentor with random weights whose predictions have all classes; other arguments replace parts of it."""
    model = dict(
        type=type,
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            test_cfg=dict(size_divisor=16),
        ),
        backbone=dict(type='VOLO', arch=ARCH, img_size=64, norm_cfg=BN),
        decode_head=dict(
            type=head,
            in_channels=[32, 64, 64, 64],
            in_index=[0, 1, 2, 3],
            pool_scales=(1, 2, 3, 6),
            channels=16,
            num_classes=classes,
            out_channels=out_channels,
            norm_cfg=BN,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=out_channels == 1, avg_non_ignore=True),
        ),
        test_cfg=dict(mode='whole'),
    )
    return ConfigDict({**model, **cfg})


def build(seed: int = 0, **arguments) -> nn.Module:
    """The segmentor of :func:`segmentor_config`; of one seed all have the same weights."""
    torch.manual_seed(seed)
    model = MODELS.build(segmentor_config(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        # Logits of mean 0 and deviation 3 on some picture, so that each class wins somewhere.
        last = model.decode_head.conv_seg
        logits = model(model.data_preprocessor(batch(picture(96, 160)))['inputs'])
        last.weight.mul_(3 / logits.std((0, 2, 3)).view(-1, 1, 1, 1))
        last.bias.copy_(-3 * logits.mean((0, 2, 3)) / logits.std((0, 2, 3)))
    return model


def batch(*images: torch.Tensor, ori_shape: tuple[int, int] | None = None, flip: str | None = None) -> dict:
    """What a data loader gives for these images (3, H, W), uint8."""
    samples = [
        SegDataSample(
            metainfo=dict(
                img_path='picture.png',
                img_shape=tuple(image.shape[1:]),
                ori_shape=ori_shape or tuple(image.shape[1:]),
                flip=flip is not None,
                flip_direction=flip,
            )
        )
        for image in images
    ]
    return dict(inputs=list(images), data_samples=samples)


def views(*batches: dict) -> dict:
    """What a data loader gives where the pipeline has ``TestTimeAug``: lists over views of lists over pictures."""
    return {key: [one[key] for one in batches] for key in ('inputs', 'data_samples')}


def picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Smooth coloured noise (3, height, width), uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator) * 255
    smooth = nn.functional.interpolate(coarse, (height, width), mode='bicubic', align_corners=False)
    return smooth[0].clamp(0, 255).byte()
