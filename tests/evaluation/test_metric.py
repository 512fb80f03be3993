"""The metric against mmseg's IoUMetric and a count in NumPy, its loss against the head's own loss of all pixels."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.dist import get_dist_info
from mmengine.evaluator import Evaluator
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.models.losses import DiceLoss
from mmseg.structures import OHEMPixelSampler, SegDataSample
from small_models import batch, build, picture

from mmseg_volo.evaluation import ConfusionIoUMetric, iou_of
from mmseg_volo.evaluation.metric import bins_of, confusion_of, has_sampled_loss, losses_of, sum_of
from mmseg_volo.models.predictions import SAMPLE_STEP

CLASSES = 5


def counted(predicted: np.ndarray, truth: np.ndarray, classes: int, ignore: int) -> np.ndarray:
    """The confusion matrix, a pixel at a time."""
    confusion = np.zeros((classes + 1, classes + 1), np.int64)
    for p, t in zip(predicted.ravel(), truth.ravel(), strict=True):
        if t != ignore:
            confusion[t if 0 <= t < classes else classes, p if 0 <= p < classes else classes] += 1
    return confusion


def sample_of(predicted, truth, path: str = 'a/1.png', **data) -> SegDataSample:
    sample = SegDataSample(metainfo=dict(img_path=path, seg_map_path='labels/1.png', reduce_zero_label=False))
    sample.set_data(dict(pred_sem_seg=PixelData(data=predicted[None]), gt_sem_seg=PixelData(data=truth[None]), **data))
    return sample


def samples_of(seed: int = 0, images: int = 4) -> list[SegDataSample]:
    """Images of several sizes whose labels have ignored pixels and values that are no class; class 3 is not in them."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(images):
        size = 20 + 3 * i, 31
        truth = torch.randint(0, CLASSES, size, generator=generator)
        truth[truth == 3] = 4
        wrong = torch.rand(size, generator=generator) < 0.4
        predicted = torch.where(wrong, torch.randint(0, CLASSES + (i == 2), size, generator=generator), truth)
        truth[:3], truth[3, :4] = 255, 77
        out.append(sample_of(predicted, truth, f'images/{i}.png'))
    return out


def evaluate(metric: IoUMetric, samples: list[SegDataSample], classes: int = CLASSES) -> dict:
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = dict(classes=[f'c{i}' for i in range(classes)])
    for i in range(0, len(samples), 2):
        evaluator.process(samples[i : i + 2])
    return evaluator.evaluate(len(samples))


@pytest.mark.parametrize('ignore', [255, 2])
def test_the_confusion_matrix_is_that_of_a_loop_and_has_the_areas_of_mmseg(ignore):
    sample = samples_of()[2]
    predicted, truth = sample.pred_sem_seg.data[0], sample.gt_sem_seg.data[0]
    confusion = confusion_of(predicted, truth, CLASSES, ignore)
    assert confusion.dtype == torch.int64 and confusion[-1, :-1].any() and confusion[:-1, -1].any()
    assert (confusion.numpy() == counted(predicted.numpy(), truth.numpy(), CLASSES, ignore)).all()
    right, union, of_predicted, of_truth = IoUMetric.intersect_and_union(predicted, truth, CLASSES, ignore)
    assert torch.equal(confusion.diagonal()[:-1].float(), right)
    assert torch.equal(confusion.sum(0)[:-1].float(), of_predicted)
    assert torch.equal(confusion.sum(1)[:-1].float(), of_truth)
    assert torch.equal((confusion.sum(0) + confusion.sum(1) - confusion.diagonal())[:-1].float(), union)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(ignore_index=2),
        dict(iou_metrics=['mIoU', 'mDice', 'mFscore']),
        dict(iou_metrics=['mFscore'], beta=2, nan_to_num=-1),
        dict(prefix='val'),
    ],
    ids=str,
)
def test_the_figures_are_those_of_mmseg(options):
    for samples in (samples_of(), [sample_of(torch.zeros(9, 9).long(), torch.full((9, 9), 255))]):
        expected = evaluate(IoUMetric(**options), samples)
        found = evaluate(ConfusionIoUMetric(**options), samples)
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=0.0101, nan_ok=True), name
    with pytest.raises(KeyError, match='mMax'):
        evaluate(ConfusionIoUMetric(iou_metrics=['mMax']), samples_of())


def test_a_class_of_more_pixels_than_float32_counts():
    side = 4097  # 2^24 pixels and 8,193 more
    truth = torch.zeros(side, side, dtype=torch.uint8)
    predicted = truth.clone()
    predicted[0] = 1
    confusion = confusion_of(predicted, truth, 2)
    assert confusion.tolist() == [[side**2 - side, side, 0], [0, 0, 0], [0, 0, 0]]
    samples = [sample_of(predicted, truth)]
    assert evaluate(ConfusionIoUMetric(), samples, 2)['aAcc'] == round(100 - 100 / side, 2)
    assert IoUMetric.intersect_and_union(predicted, truth, 2, 255)[3][0] != side**2  # in float32


@pytest.mark.parametrize('reduced', [False, True])
def test_predictions_are_saved_as_mmseg_saves_them(tmp_path, reduced):
    samples = samples_of()
    for sample in samples:
        sample.set_metainfo(dict(reduce_zero_label=reduced))
        del sample.gt_sem_seg
    for kind in (IoUMetric, ConfusionIoUMetric):
        metric = kind(output_dir=str(tmp_path / kind.__name__), format_only=True)
        assert evaluate(metric, samples) == {}
    for i, sample in enumerate(samples):
        one, other = (cv2.imread(str(tmp_path / kind / f'{i}.png'), -1) for kind in ('IoUMetric', 'ConfusionIoUMetric'))
        assert (one == other).all() and (one == sample.pred_sem_seg.data[0].numpy() + reduced).all()


def test_the_images_are_described():
    metric = ConfusionIoUMetric()
    metric.keep = 1
    samples = samples_of(images=6)
    samples[4].gt_sem_seg.data[:] = 255
    evaluate(metric, samples)
    for i, (image, sample) in enumerate(zip(metric.images, samples, strict=True)):
        assert (image['path'], image['truth']) == (f'images/{i}.png', 'labels/1.png')
        confusion = counted(sample.pred_sem_seg.data[0].numpy(), sample.gt_sem_seg.data[0].numpy(), CLASSES, 255)
        assert (image['confusion'].to_dense().numpy() == confusion).all()
        confusion = confusion[:-1, :-1]
        assert image['pixels'] == confusion.sum()
        if i == 4:
            assert image['mIoU'] is image['accuracy'] is None
            continue
        assert image['mIoU'] == pytest.approx(np.nanmean(iou_of(confusion)[[0, 1, 2, 4]]))
        assert image['accuracy'] == pytest.approx(np.trace(confusion) / confusion.sum())
    order = sorted((image['mIoU'], i) for i, image in enumerate(metric.images) if image['mIoU'] is not None)
    assert [i for i, image in enumerate(metric.images) if 'pngs' in image] == sorted([order[0][1], order[-1][1]])
    for png, data in zip(metric.images[order[0][1]]['pngs'], ('pred_sem_seg', 'gt_sem_seg'), strict=True):
        found = cv2.imdecode(np.frombuffer(png, np.uint8), -1)
        assert (found == samples[order[0][1]].get(data).data[0].numpy()).all()
    assert sum_of(metric.images).sum() == sum(image['confusion'].to_dense().sum() for image in metric.images)


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r'prediction \(4, 6\) and ground truth \(8, 6\) have different sizes'):
        evaluate(ConfusionIoUMetric(), [sample_of(torch.zeros(4, 6).long(), torch.zeros(8, 6).long())])


def test_bins_of_confidence():
    confidence = torch.tensor([0.0, 0.024, 0.051, 0.5, 1.0, float('nan')])
    right = torch.tensor([True, False, True, True, True, False])
    pixels, total, correct = bins_of(confidence, right)
    assert pixels.tolist() == [3, 1, *[0] * 8, 1, *[0] * 8, 1]
    assert (
        total[[0, 1, 10, 19]] == pytest.approx([0.024, 0.051, 0.5, 1]) and correct[[0, 1, 10, 19]].tolist() == [1] * 4
    )


def labelled(model, sizes=((50, 70), (64, 40))) -> list[SegDataSample]:
    """Predictions with samples and with all logits; the ground truth is the prediction with blocks of other classes."""
    model.network.sampled = True
    model.test_cfg['return_logits'] = True
    samples = []
    for i, size in enumerate(sizes):
        (sample,) = model.test_step(batch(picture(*size, seed=i)))
        truth = sample.pred_sem_seg.data.long().clone()
        truth[:, 10:20], truth[:, :, :9] = 1, 255
        sample.gt_sem_seg = PixelData(data=truth)
        samples.append(sample)
    return samples


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(head='LeanUPerHead'),
        dict(classes=2, out_channels=1),
        dict(test_cfg=dict(mode='slide', crop_size=(32, 32), stride=(21, 21))),
        dict(average=True),
        dict(losses=True),
    ],
    ids=str,
)
def test_the_loss_is_that_of_training_for_the_sampled_pixels(options):
    options = dict(options)
    average, losses = options.pop('average', False), options.pop('losses', False)
    model = build(**options)
    head = model.decode_head
    head.loss_decode.avg_non_ignore = average
    if losses:
        head.loss_decode = torch.nn.ModuleList([head.loss_decode, DiceLoss(loss_weight=3.0)])
    samples = labelled(model)
    every = slice(None, None, SAMPLE_STEP)
    for sample in samples:
        logits = sample.sampled_logits.data
        torch.testing.assert_close(
            logits if head.out_channels > 1 else logits.sigmoid(), sample.seg_logits.data[:, every, every]
        )
    state = torch.get_rng_state()
    metric = ConfusionIoUMetric()
    metric.head = head
    classes = head.num_classes
    found = evaluate(metric, samples, classes)
    assert torch.equal(torch.get_rng_state(), state)
    # The head's loss of both images, weighted by hand.
    total, weights = {}, 0
    for sample in samples:
        truth = sample.gt_sem_seg.data[:, every, every]
        one = head.loss_by_feat(sample.sampled_logits.data[None], [SegDataSample(gt_sem_seg=PixelData(data=truth))])
        weight = (truth != 255).sum() if average else truth.numel()
        weights += weight
        for name in one.keys() - {'acc_seg'}:
            total[name] = total.get(name, 0) + float(one[name]) * float(weight)
    assert len(total) == 1 + losses
    for name, value in total.items():
        assert found[f'val/decode.{name}'] == pytest.approx(value / float(weights), rel=1e-5)
    assert found['val/loss'] == pytest.approx(sum(total.values()) / float(weights), rel=1e-5)
    if not losses and head.out_channels > 1:  # what anybody would write for it
        summed = [
            torch.nn.functional.cross_entropy(
                sample.seg_logits.data[None, :, every, every],
                sample.gt_sem_seg.data[:, every, every],
                ignore_index=255,
                reduction='sum',
            )
            for sample in samples
        ]
        assert found['val/loss'] == pytest.approx(float(sum(summed) / weights), rel=1e-5)


def measure(samples: list[SegDataSample], head) -> tuple[dict, list]:
    metric = ConfusionIoUMetric()
    metric.head, metric.keep = head, 1
    rank, world = get_dist_info()
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = dict(classes=[f'c{i}' for i in range(head.num_classes)])
    own = [samples[i % len(samples)] for i in range(rank, -(-len(samples) // world) * world, world)]
    for sample in own:  # as DefaultSampler deals them out
        evaluator.process([sample])
    return evaluator.evaluate(len(samples)), metric.images


def measure_on_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    samples, head = torch.load(folder / 'samples.pt', weights_only=False)
    torch.save(measure(samples, head), folder / f'found_{rank}.pt')


@pytest.mark.slow
def test_two_ranks_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # mmengine gathers through files below it
    model = build()
    samples = labelled(model, [(50, 70), (64, 40), (33, 33)])
    torch.save((samples, model.decode_head), tmp_path / 'samples.pt')
    expected, images = measure(samples, model.decode_head)
    torch.multiprocessing.spawn(measure_on_rank, (tmp_path,), nprocs=2)
    found, other = (torch.load(tmp_path / f'found_{rank}.pt', weights_only=False) for rank in range(2))
    assert found[0] == other[0] == expected and 'val/loss' in expected
    assert other[1] is None and len(found[1]) == 3
    for one, two in zip(found[1], images, strict=True):
        assert torch.equal(one['confusion'].to_dense(), two['confusion'].to_dense())
        assert (one['calibration'] == two['calibration']).all()
        assert one['losses'] == two['losses'] and one['mIoU'] == two['mIoU']


def test_the_calibration_is_that_of_the_sampled_pixels():
    for options in (dict(), dict(classes=2, out_channels=1)):
        model = build(**options)
        model.test_cfg['confidence'] = True
        samples = labelled(model)
        metric = ConfusionIoUMetric()
        evaluate(metric, samples, model.decode_head.num_classes)
        for image, sample in zip(metric.images, samples, strict=True):
            confidence, truth, predicted = (
                data.data[0, ::SAMPLE_STEP, ::SAMPLE_STEP]
                for data in (sample.seg_confidence, sample.gt_sem_seg, sample.pred_sem_seg)
            )
            kept = truth != 255
            expected = bins_of(confidence[kept], (predicted == truth)[kept])
            assert image['calibration'] == pytest.approx(expected, rel=1e-5) and 'losses' not in image


def test_images_without_a_pixel_to_weigh_have_no_loss():
    model = build()
    model.decode_head.loss_decode.avg_non_ignore = True
    samples = labelled(model)
    metric = ConfusionIoUMetric()
    metric.head = model.decode_head
    expected = evaluate(metric, samples[:1], 7)['val/loss']
    samples[1].gt_sem_seg.data[:] = 255
    assert evaluate(metric, samples, 7)['val/loss'] == expected
    assert 'val/loss' not in evaluate(metric, samples[1:], 7)


def test_values_that_are_no_class_do_not_count_in_the_loss():
    model = build()
    logits, truth = torch.randn(7, 8, 9), torch.randint(0, 7, (8, 9))
    truth[0] = 255
    expected = losses_of(model.decode_head, logits, truth)
    truth[0], truth[0, 0] = 77, -1
    assert losses_of(model.decode_head, logits, truth) == expected
    assert expected[1] == 63 and expected[0]['loss'] > 0


def test_heads_whose_loss_takes_more_than_logits_have_none():
    assert has_sampled_loss(build().decode_head) and has_sampled_loss(build(head='LeanUPerHead').decode_head)

    class Odd(type(build().decode_head)):
        def loss_by_feat(self, *arguments):
            raise NotImplementedError

    head = build().decode_head
    head.__class__ = Odd
    assert not has_sampled_loss(head) and not has_sampled_loss(torch.nn.Identity())
    head = build().decode_head
    head.sampler = OHEMPixelSampler(head)  # its loss is that of the hard pixels alone
    assert not has_sampled_loss(head)
