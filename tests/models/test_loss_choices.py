"""The losses that docs/own_data.md offers, each against its definition in float64, a pixel at a time."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

DOCS = Path(__file__).resolve().parents[2] / 'docs/own_data.md'
CLASSES, IGNORED, SIZE = 3, 255, (2, 5, 6)


def choice(name: str) -> dict:
    """The arguments of a head that the page has in the row that begins with this name."""
    row = re.search(rf'^\| {name}.*\| `(.*)` \|$', DOCS.read_text(encoding='utf-8'), re.MULTILINE)[1]
    return eval(f'dict({row})')


def losses_of(options: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict:
    init_default_scope('mmseg')
    head = MODELS.build(
        dict(type='LeanFCNHead', in_channels=8, channels=8, num_convs=0, concat_input=False, num_classes=CLASSES)
        | options
    )
    return head.loss_by_feat(logits, [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in labels])


@pytest.fixture
def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels, some of them ignored; the last class is rare."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, SIZE, generator=generator)
    labels[0, 0, :2], labels[:, 2, 3:] = 2, IGNORED
    return 2 * torch.randn(2, CLASSES, *SIZE[1:], generator=generator, dtype=torch.float64), labels


def pixels(logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, int, list[float]]]:
    """Image, class and probabilities of each pixel that is not ignored."""
    out = []
    for b, y, x in np.ndindex(*labels.shape):
        if labels[b, y, x] != IGNORED:
            powers = [math.exp(value) for value in logits[b, :, y, x].tolist()]
            out.append((b, int(labels[b, y, x]), [power / sum(powers) for power in powers]))
    return out


def check(options: dict, maps: tuple, expected: dict[str, float]) -> None:
    logits, labels = maps[0].clone().requires_grad_(), maps[1]
    found = losses_of(options, logits, labels)
    assert {name for name in found if name.startswith('loss')} == set(expected)
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-5), name
    sum(found[name] for name in expected).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


def cross_entropy(maps: tuple) -> float:
    return -sum(math.log(p[c]) for _, c, p in pixels(*maps)) / maps[1].numel()


def test_class_weights(maps):
    options = choice('rare classes')
    weights = options['loss_decode']['class_weight'] = [0.5, 1.0, 4.0]
    assert choice('rare classes')['loss_decode']['class_weight'] == [...]  # for the reader to fill in
    options['loss_decode']['type'] = 'CrossEntropyLoss'  # the configs have it
    found = pixels(*maps)
    expected = -sum(weights[c] * math.log(p[c]) for _, c, p in found) / sum(weights[c] for _, c, _ in found)
    check(options, maps, dict(loss_ce=expected))


def test_lovasz(maps):
    """The Lovász extension of the Jaccard loss (Berman et al., CVPR 2018, equations 8 and 11)."""
    found = pixels(*maps)

    def jaccard(truth: set, wrong: set) -> float:
        return 1 - len(truth - wrong) / len(truth | wrong) if truth | wrong else 0.0

    terms = []
    for c in range(CLASSES):
        truth = {i for i, (_, label, _) in enumerate(found) if label == c}
        errors = [1 - p[c] if label == c else p[c] for _, label, p in found]
        wrong, value = set(), 0.0
        for i in sorted(range(len(found)), key=lambda i: -errors[i]):
            value += errors[i] * (jaccard(truth, wrong | {i}) - jaccard(truth, wrong))
            wrong.add(i)
        terms.append(value)
    maps = maps[0].float(), maps[1]  # mmseg's loss takes no float64
    check(choice('the mIoU'), maps, dict(loss_ce=cross_entropy(maps), loss_lovasz=sum(terms) / CLASSES))


def test_dice(maps):
    """One minus the Dice coefficient of each image and class, with 1 added above and below."""
    terms = []
    for b in range(SIZE[0]):
        for c in range(CLASSES):
            mine = [(label == c, p[c]) for image, label, p in pixels(*maps) if image == b]
            hit = sum(p for is_c, p in mine if is_c)
            terms.append(1 - (2 * hit + 2) / (sum(p for _, p in mine) + sum(is_c for is_c, _ in mine) + 2))
    check(choice('small regions'), maps, dict(loss_ce=cross_entropy(maps), loss_dice=sum(terms) / len(terms)))


@pytest.mark.parametrize('kept', [4, 100])
def test_hard_pixels(maps, kept):
    """OHEM keeps the pixels whose class has a probability below the threshold, and at least ``min_kept`` an image."""
    options = choice('hard pixels')
    assert options['sampler']['min_kept'] == 100000
    options['sampler']['min_kept'] = kept
    found = sorted(p[c] for _, c, p in pixels(*maps))
    limit = max(options['sampler']['thresh'], found[min(2 * kept, len(found) - 1)])
    expected = -sum(math.log(p) for p in found if p < limit) / maps[1].numel()
    check(options, maps, dict(loss_ce=expected))


def test_a_loss_for_another_head_cannot_be_used(maps):
    """Why the config check refuses it."""
    with pytest.raises(TypeError, match='weight'):
        losses_of(dict(loss_decode=dict(type='OhemCrossEntropy')), *maps)


def test_two_classes(maps):
    """Softmax over two outputs, and the sigmoid of their difference, are the same loss."""
    logits, labels = maps[0][:, :2], maps[1].clone()
    labels[labels == 2] = 1
    one = losses_of(dict(num_classes=2), logits, labels)
    options = choice('two classes, one output')
    assert options['num_classes'] == 2 and options['out_channels'] == 1
    other = losses_of(options, logits[:, 1:] - logits[:, :1], labels)
    assert float(one['loss_ce']) == pytest.approx(float(other['loss_ce']), rel=1e-6)
    assert float(one['acc_seg']) == pytest.approx(float(other['acc_seg']), rel=1e-6)
