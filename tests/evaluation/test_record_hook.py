"""The record of an evaluation, from real test and training runs of small models, against what mmseg's metric saves."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import CONFIG, miou, run, tool
from mmengine.structures import PixelData
from mmseg.registry import METRICS, MODELS
from small_evaluation import drawn_dataset, evaluation_config
from small_models import build
from small_runs import differences, small_config

from mmseg_volo.engine.runner import VOLORunner, build_runner
from mmseg_volo.evaluation import EvaluationRecordHook, iou_of
from mmseg_volo.evaluation.boundary import boundary_counts
from mmseg_volo.evaluation.metric import confusion_of
from mmseg_volo.models.predictions import SAMPLE_STEP
from mmseg_volo.report import write_report

PICTURES = 6


def write_pictures(folder: Path, classes: int) -> None:
    """Noise and blocks of labels with something ignored; the last picture has no labelled pixel."""
    rng = np.random.default_rng(0)
    for name in ('images', 'labels'):
        (folder / name).mkdir(parents=True)
    for i in range(PICTURES):
        image = cv2.resize(rng.integers(0, 256, (6, 8, 3), np.uint8), (64, 48), interpolation=cv2.INTER_CUBIC)
        label = np.repeat(np.repeat(rng.integers(0, classes, (6, 8), np.uint8), 8, 0), 8, 1)
        label[:, :8] = 255
        label[:] = 255 if i == PICTURES - 1 else label
        cv2.imwrite(str(folder / f'images/{i}.png'), image)
        cv2.imwrite(str(folder / f'labels/{i}.png'), label)


def make_runner(
    folder: Path,
    classes: int = 4,
    labels: bool = True,
    tta: bool = False,
    hook=None,
    metric: str = 'ConfusionIoUMetric',
    **model,
):
    """A runner of mmengine's test loop, with the data and the predictions saved by the metric in ``folder``."""
    write_pictures(folder, classes)
    load = [dict(type='LoadAnnotations')] if labels else []
    steps = [dict(type='LoadImageFromFile'), *load, dict(type='PackSegInputs')]
    network = build(classes=classes, **model)
    if tta:
        flips = [dict(type='RandomFlip', prob=p, direction='horizontal') for p in (0.0, 1.0)]
        steps[1:] = [dict(type='TestTimeAug', transforms=[flips, load, steps[-1:]])]
        network = MODELS.build(dict(type='StreamingTTAModel', module=network))
    data = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        img_suffix='.png',
        metainfo=dict(classes=[f'c{i}' for i in range(classes)], palette=[[i, 2 * i, 255 - i] for i in range(classes)]),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        pipeline=steps,
    )
    loader = dict(
        num_workers=0, batch_size=1 if tta else 4, sampler=dict(type='DefaultSampler', shuffle=False), dataset=data
    )
    if tta:
        loader['collate_fn'] = dict(type='pseudo_collate')
    return VOLORunner(
        network,
        str(folder / 'run'),
        test_dataloader=loader,
        test_cfg=dict(type='TestLoop'),
        test_evaluator=dict(type=metric, output_dir=str(folder / 'out'), format_only=not labels),
        custom_hooks=[dict(type='EvaluationRecordHook', **(hook or {}))],
        randomness=dict(seed=0),
        default_scope='mmseg',
        experiment_name=f'{folder.parent.name}_{folder.name}',
    )


def record_of(runner, name: str = 'test') -> dict | None:
    path = Path(runner.log_dir, 'evaluation', f'{name}.json')
    return json.loads(path.read_text()) if path.exists() else None


def log_of(runner) -> str:
    return next(Path(runner.log_dir).glob('*.log')).read_text()


def percent(values: np.ndarray) -> float:
    return round(100 * float(np.nanmean(values)), 2)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(tta=True),
        dict(type='EncoderDecoder'),
        dict(metric='IoUMetric'),  # as in configs of other people
        dict(metric='IoUMetric', type='EncoderDecoder'),
        dict(classes=2, out_channels=1),
    ],
    ids=str,
)
def test_a_test_leaves_the_metric_it_printed(tmp_path, options):
    runner = make_runner(tmp_path, hook=dict(keep=2), **options)
    metrics = runner.test()
    record = record_of(runner)
    confusion = np.array(record['confusion'])
    iou = iou_of(confusion)
    assert percent(iou) == record['metrics']['mIoU'] == pytest.approx(metrics['mIoU'], abs=1e-4)
    assert round(100 * np.trace(confusion) / confusion.sum(), 2) == record['metrics']['aAcc']
    assert record['kind'] == 'test' and record['aug_test'] is options.get('tta', False)
    assert record['dataset']['pictures'] == len(record['pictures']) == PICTURES
    # Each image by itself, from the file that the metric saved of it.
    scores, areas = {}, np.zeros((2, len(confusion)))
    for i, picture in enumerate(record['pictures']):
        predicted, truth = (
            torch.from_numpy(cv2.imread(str(tmp_path / f'{name}/{i}.png'), -1)).long() for name in ('out', 'labels')
        )
        one = confusion_of(predicted, truth, len(confusion))[:-1, :-1].numpy()
        confusion -= one
        assert Path(picture['path']).name == Path(picture['truth']).name == f'{i}.png'
        assert picture['pixels'] == one.sum() and ('prediction' in picture) == ('truth_map' in picture)
        if one.sum():
            areas += boundary_counts(predicted, truth, len(confusion))
            scores[i] = picture['mIoU']
            assert picture['mIoU'] == pytest.approx(iou_of(one)[one.sum(1) > 0].mean(), abs=1e-6)
            assert picture['accuracy'] == pytest.approx(np.trace(one) / one.sum(), abs=1e-6)
        if 'prediction' in picture:
            kept = [Path(runner.log_dir, 'evaluation', picture[name]) for name in ('prediction', 'truth_map')]
            found = [torch.from_numpy(cv2.imread(str(path), -1)).long() for path in kept]
            assert torch.equal(found[0], predicted) and torch.equal(found[1], truth)
    assert not confusion.any() and record['pictures'][-1]['mIoU'] is None
    assert 100 * record['boundary']['mIoU'] == pytest.approx(100 * float(np.nanmean(areas[0] / areas[1])), abs=1e-3)
    assert record['mIoU_of_pictures']['50%'] == pytest.approx(np.median([*scores.values()]), abs=1e-5)
    assert f'boundary mIoU {100 * record["boundary"]["mIoU"]:.2f}' in log_of(runner)
    order = sorted(scores, key=scores.get)
    kept = {i for i, picture in enumerate(record['pictures']) if 'prediction' in picture}
    assert kept == {*order[:2], *order[-2:]}
    # mmseg's own segmentor gives no sample; ours is as it was before the test.
    assert (record['calibration'] is None) == (options.get('type') == 'EncoderDecoder')
    assert not getattr(runner.model, 'network', runner).__dict__.get('sampled')
    assert 'val/loss' not in metrics


@pytest.mark.parametrize('tta', [False, True])
def test_calibration_is_that_of_the_sampled_pixels(tmp_path, tta):
    runner = make_runner(tmp_path, tta=tta)
    runner.test()
    calibration = record_of(runner)['calibration']
    (runner.model.module if tta else runner.model).test_cfg['confidence'] = True
    confidence, right = [], []
    for batch in runner.test_dataloader:
        for sample in runner.model.test_step(batch):
            truth, predicted, sure = (
                part.data[0, ::SAMPLE_STEP, ::SAMPLE_STEP]
                for part in (sample.gt_sem_seg, sample.pred_sem_seg, sample.seg_confidence)
            )
            counted = truth != 255
            confidence.append(sure[counted])
            right.append((predicted == truth)[counted])
    confidence, right = torch.cat(confidence).double().numpy(), torch.cat(right).numpy()
    of_bin = np.clip(np.floor(confidence * 20), 0, 19)
    ece = sum(
        abs(confidence[of_bin == k].mean() - right[of_bin == k].mean()) * (of_bin == k).mean()
        for k in np.unique(of_bin)
    )
    assert sum(one['pixels'] for one in calibration['bins']) == len(right) and calibration['step'] == SAMPLE_STEP
    assert calibration['ece'] == pytest.approx(ece, abs=2e-6) and ece > 0.01
    for k, one in enumerate(calibration['bins']):
        if one['pixels']:
            assert one['confidence'] == pytest.approx(confidence[of_bin == k].mean(), abs=1e-6)
            assert one['accuracy'] == pytest.approx(right[of_bin == k].mean(), abs=1e-6)


def test_the_hook_refuses_bad_options_and_switches_off(tmp_path):
    with pytest.raises(ValueError, match='keep must be 0 or more, got -1'):
        EvaluationRecordHook(keep=-1)
    runner = make_runner(tmp_path, hook=dict(keep=0, confidence=False))
    runner.test()
    record = record_of(runner)
    assert record['calibration'] is None and not any('prediction' in picture for picture in record['pictures'])


def test_without_labels_there_is_no_record_and_the_test_goes_on(tmp_path):
    runner = make_runner(tmp_path, labels=False)
    runner.test()
    assert len(list((tmp_path / 'out').glob('*.png'))) == PICTURES
    assert not Path(runner.log_dir, 'evaluation').exists()
    assert log_of(runner).count('test: no evaluation record (the data has no ground truth)') == 1


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path):
    runner = make_runner(tmp_path)
    Path(runner.log_dir, 'evaluation').write_text('in the way')
    assert runner.test()['mIoU'] > 0
    assert 'WARNING - test: the evaluation record could not be written' in log_of(runner)


@pytest.mark.parametrize(
    ('change', 'why'),
    [
        (lambda ids: ids[:, ::2], 'prediction (24, 64) and ground truth (48, 64) have different sizes'),
        (lambda ids: ids + 1, 'predictions that are no class: the data set has 4'),
    ],
    ids=['sizes', 'classes'],
)
def test_odd_predictions_are_a_line_in_the_log(tmp_path, change, why):
    runner = make_runner(tmp_path)
    step = runner.model.test_step

    def changed(data):
        for sample in (samples := step(data)):
            sample.pred_sem_seg = PixelData(data=change(sample.pred_sem_seg.data))
        return samples

    runner.model.test_step = changed
    runner.test_loop.evaluator.metrics[0].format_only = True  # the evaluator itself does not compare them
    runner.test()
    assert record_of(runner) is None and f'no evaluation record ({why}' in log_of(runner)


def test_other_metrics_stand_beside(tmp_path):
    """As CityscapesMetric, which has figures of other names."""
    runner = make_runner(tmp_path)
    other = METRICS.build(dict(type='IoUMetric', prefix='other'))
    other.dataset_meta = runner.test_loop.evaluator.metrics[0].dataset_meta
    runner.test_loop.evaluator.metrics.append(other)
    metrics = runner.test()
    assert metrics['mIoU'] == pytest.approx(metrics['other/mIoU'], abs=0.0101)
    assert metrics == pytest.approx(record_of(runner)['metrics'], abs=1e-4)


def test_wrapped_data_and_metrics_with_a_prefix(tmp_path):
    data = [drawn_dataset(tmp_path / name) for name in 'ab']
    config = evaluation_config(tmp_path, 'run', dict(type='ConcatDataset', datasets=data))
    config.test_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=config.test_dataloader.dataset)
    dump = dict(type='DumpResults', out_file_path=str(tmp_path / 'all.pkl'))
    config.test_evaluator = [dump, dict(type='IoUMetric', prefix='a')]
    runner = build_runner(config, 'test')
    metrics = runner.test()
    record = record_of(runner)
    assert {key: record['metrics'][f'a/{key}'] for key in ('aAcc', 'mIoU', 'mAcc')} == pytest.approx(
        {key: record['metrics'][key] for key in ('aAcc', 'mIoU', 'mAcc')}, abs=0.011
    )
    assert record['metrics']['a/mIoU'] == pytest.approx(metrics['a/mIoU'], abs=1e-4) and metrics['a/mIoU'] > 0
    about = record['dataset']
    assert (about['type'], about['pictures']) == ('BaseSegDataset and 1 more', 8)
    assert (about['data_root'], about['img_path']) == (str(tmp_path / 'a'), str(tmp_path / 'a/images'))


def test_training_leaves_a_record_of_each_validation(tmp_path):
    config = small_config(tmp_path, train_cfg__max_iters=2, train_cfg__val_interval=1)
    runner = build_runner(config)
    runner.train()
    rows = [json.loads(line) for line in Path(runner.log_dir, 'vis_data/scalars.json').read_text().splitlines()]
    printed = {row['step']: row['mIoU'] for row in rows if 'mIoU' in row}
    losses = {row['step']: row['val/loss'] for row in rows if 'mIoU' in row}
    assert losses == {row['step']: row['val/decode.loss_ce'] for row in rows if 'mIoU' in row}
    records = {n: record_of(runner, f'val_iter_{n}') for n in (1, 2)}
    for n, record in records.items():
        assert record['iteration'] == n and record['kind'] == 'val' and record['checkpoint'] is None
        assert record['calibration']['bins'] and record['metrics']['val/loss'] == round(losses[n], 4)
        assert percent(iou_of(np.array(record['confusion']))) == pytest.approx(printed[n], abs=1e-4)
    # PNGs are kept of the newest and of the best one.
    best = max(records, key=lambda n: records[n]['metrics']['mIoU'])
    kept = {path.name for path in Path(runner.log_dir, 'evaluation/pictures').iterdir()}
    assert {'val_iter_2', f'val_iter_{best}'} >= kept >= {'val_iter_2'}
    page = write_report([runner.work_dir]).read_text()
    for text in ('Loss of the decode head', 'Validation of iteration 2', 'VOLO LeanUPerHead', 'StreetSceneDataset'):
        assert text in page
    assert page.count('<img') == 2 * 4  # two pictures of four panels


def test_what_validations_measure_does_not_change_training(tmp_path):
    checkpoints = []
    for hook in (dict(), dict(keep=0, confidence=False, loss=False)):
        config = small_config(tmp_path, str(len(hook)), train_cfg__max_iters=2, train_cfg__val_interval=1)
        others = [one for one in config.custom_hooks if one.type != 'EvaluationRecordHook']
        config.custom_hooks = [*others, dict(type='EvaluationRecordHook', **hook)]
        runner = build_runner(config)
        runner.train()
        checkpoints.append(Path(runner.work_dir, 'iter_2.pth'))
        assert ('val/val/loss' in runner.message_hub.log_scalars) == (not hook)
    assert differences(*checkpoints) == []


@pytest.mark.slow
def test_two_ranks_leave_the_record_of_one(tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text(CONFIG.replace('DATA', str(tmp_path / 'scenes')))
    tool('train.py', config, '--work-dir', tmp_path / 'run')
    checkpoint = tmp_path / 'run/iter_4.pth'
    output = tool('test.py', config, checkpoint, '--work-dir', tmp_path / 'one')
    two = run(
        *('bash', 'tools/dist_test.sh', config, checkpoint, '2', '--work-dir', tmp_path / 'two'),
        PORT='29631',
        OMP_NUM_THREADS='1',
    )
    records = [
        json.loads(next((tmp_path / name).glob('*/evaluation/test.json')).read_text()) for name in ('one', 'two')
    ]
    # Three images on two ranks: the sampler repeats the first.
    assert [record['environment']['processes'] for record in records] == [1, 2]
    for name in ('confusion', 'pictures', 'metrics', 'dataset', 'calibration', 'iteration'):
        assert records[0][name] == records[1][name], name
    assert len(records[1]['pictures']) == 3 and records[1]['iteration'] == 4
    assert miou(output) == miou(two) == f'{records[1]["metrics"]["mIoU"]:.4f}'
    assert percent(iou_of(np.array(records[1]['confusion']))) == records[1]['metrics']['mIoU']
    pngs = [
        sorted(path.name for path in (tmp_path / name).glob('*/evaluation/pictures/test/*')) for name in ('one', 'two')
    ]
    assert pngs[0] == pngs[1] and len(pngs[0]) == 6
