"""Losses from bands of rows against mmseg's own, from the same heads."""

import weakref

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_volo import losses


def heads(loss=None, **changes) -> list:
    """mmseg's head and ours."""
    config = dict(in_channels=8, channels=8, num_convs=0, concat_input=False, num_classes=5, norm_cfg=dict(type='BN'))
    loss = dict(dict(type='CrossEntropyLoss'), **(loss or {}))
    return [MODELS.build(dict(config, type=kind, loss_decode=loss, **changes)) for kind in ('FCNHead', 'LeanFCNHead')]


def samples(size, ignored=0.2, batch=2) -> list[SegDataSample]:
    labels = torch.randint(0, 5, (batch, 1, *size))
    labels[torch.rand(labels.shape) < ignored] = 255
    return [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]


def run(head, logits, data):
    logits = logits.clone().requires_grad_()
    try:
        found = head.loss_by_feat(logits, data)
    except IndexError:
        if isinstance(head, losses.LeanFCNHead):
            raise
        pytest.skip('mmsegmentation 1.2 fails on class weights with ignored pixels')
    (name,) = (name for name in found if name.startswith('loss'))
    (3 * found[name]).backward()
    return name, found[name].detach(), found['acc_seg'], logits.grad


OPTIONS = {
    'plain': {},
    'named and weighted': dict(loss_weight=0.4, loss_name='loss_aux'),
    'not ignored': dict(avg_non_ignore=True),
    'class weights': dict(class_weight=[1.0, 0.5, 2.0, 0.0, 1.5]),
}


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('sizes', [((4, 6), (32, 48)), ((5, 7), (33, 50)), ((9, 4), (9, 4)), ((8, 8), (5, 3))], ids=str)
@pytest.mark.parametrize('option', OPTIONS)
def test_loss_accuracy_and_gradient_are_mmsegs(option, sizes, align_corners, monkeypatch):
    monkeypatch.setattr(losses, '_BAND', 2 * 5 * sizes[1][1] * 7)  # seven rows
    stock, lean = heads(OPTIONS[option], align_corners=align_corners)
    logits, data = 3 * torch.randn(2, 5, *sizes[0], dtype=torch.float64), samples(sizes[1])
    expected, found = run(stock, logits, data), run(lean, logits, data)
    assert found[0] == expected[0]
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-6, atol=1e-9)


def test_all_ignored_and_no_gradient():
    stock, lean = heads()
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16), ignored=1.1)
    for one, other in zip(run(lean, logits, data)[1:], run(stock, logits, data)[1:], strict=True):
        torch.testing.assert_close(one, other)
    data = samples((16, 16))
    with torch.no_grad():
        found, expected = (head.loss_by_feat(logits, data)['loss_ce'] for head in (lean, stock))
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_class_weights_without_ignored_pixels():
    """mmseg fails with an IndexError when both are asked for; the mean over counted pixels is the same either way."""
    weights = OPTIONS['class weights']
    stock, _ = heads(weights)
    _, lean = heads(dict(weights, avg_non_ignore=True))
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16))
    torch.testing.assert_close(run(lean, logits, data)[1], run(stock, logits, data)[1])


@pytest.mark.parametrize(
    ('loss', 'changes'),
    [
        (dict(use_sigmoid=True), {}),
        (dict(reduction='sum'), {}),
        (dict(type='DiceLoss'), {}),
        ({}, dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=10))),
    ],
    ids=str,
)
def test_other_losses_are_left_to_mmseg(loss, changes, monkeypatch):
    monkeypatch.setattr(losses, '_BandedCrossEntropy', None)
    stock, lean = heads(loss, **changes)
    logits, data = torch.randn(2, 5, 4, 4), samples((16, 16))
    for one, other in zip(run(lean, logits, data)[1:], run(stock, logits, data)[1:], strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_it_is_at_least_as_exact():
    stock, lean = heads()
    logits, data = 3 * torch.randn(2, 5, 4, 4), samples((64, 64))
    exact = run(stock, logits.bfloat16().double(), data)
    with torch.autocast('cpu', torch.bfloat16):
        plain, ours = (run(head, logits.bfloat16(), data) for head in (stock, lean))
    assert ours[3].dtype == torch.bfloat16
    assert (ours[1] - exact[1]).abs() <= (plain[1] - exact[1]).abs() + 1e-6
    assert (ours[3] - exact[3]).norm() <= 1.1 * (plain[3] - exact[3]).norm()


def test_keeps_nothing_in_the_size_of_the_labels():
    logits, data, size = torch.randn(2, 5, 4, 4, requires_grad=True), samples((64, 64)), 2 * 5 * 64 * 64
    for head, least, most in zip(heads(), (size, 0), (float('inf'), size / 10), strict=True):
        saved = []

        def pack(x, saved=saved):
            saved.append((weakref.ref(x), x.numel()))
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            found = head.loss_by_feat(logits, data)
        kept = sum(count for reference, count in saved if reference() is not None)
        assert least <= kept <= most and found['loss_ce'].requires_grad
