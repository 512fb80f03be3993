"""The record of an evaluation, from real test and training runs of small models, against mmseg's own metric."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import CONFIG, miou, run, tool
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.registry import MODELS
from small_models import build
from small_runs import small_config

from mmseg_volo.engine.runner import VOLORunner, build_runner
from mmseg_volo.evaluation import NoRecord, confusion_of, iou_of
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


def make_runner(folder: Path, classes: int = 4, labels: bool = True, tta: bool = False, hook=None, **model):
    """A runner of mmengine's test loop, with the data and the predictions saved by IoUMetric in ``folder``."""
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
        test_evaluator=dict(type='IoUMetric', output_dir=str(folder / 'out'), format_only=not labels),
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


@pytest.mark.parametrize('ignore', [255, 2])
def test_the_confusion_matrix_has_the_areas_of_mmsegs_metric(ignore):
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (40, 50), generator=generator)
    truth[:5] = 255
    predicted = torch.where(torch.rand(40, 50, generator=generator) < 0.5, truth % 5, truth.flip(0) % 5)
    truth[truth == 3] = 4  # a class that is predicted only
    predicted[predicted == 3] = 3
    kept = truth.clone()
    kept[(truth == 255) & (ignore != 255)] = ignore  # mmseg would count it among the predictions
    confusion, counted = confusion_of(predicted, kept, 5, ignore)
    right, union, of_predicted, of_truth = IoUMetric.intersect_and_union(predicted, kept, 5, ignore)
    assert confusion.sum() == counted.sum() == of_truth.sum() > 0
    assert (np.diag(confusion) == right.numpy()).all()
    assert (confusion.sum(0) == of_predicted.numpy()).all() and (confusion.sum(1) == of_truth.numpy()).all()
    np.testing.assert_allclose(iou_of(confusion), (right / union).numpy(), rtol=1e-6)
    with pytest.raises(NoRecord, match='predictions of 5'):
        confusion_of(predicted + 1, kept, 5, ignore)


@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(tta=True),
        dict(type='EncoderDecoder'),
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
    # Each picture by itself, from the file that IoUMetric saved of it.
    scores = {}
    for i, picture in enumerate(record['pictures']):
        predicted, truth = (
            torch.from_numpy(cv2.imread(str(tmp_path / f'{name}/{i}.png'), -1)).long() for name in ('out', 'labels')
        )
        one, _ = confusion_of(predicted, truth, len(confusion))
        confusion -= one
        assert Path(picture['path']).name == Path(picture['truth']).name == f'{i}.png'
        assert picture['pixels'] == one.sum() and ('prediction' in picture) == ('truth_map' in picture)
        if one.sum():
            scores[i] = picture['mIoU']
            assert picture['mIoU'] == pytest.approx(iou_of(one)[one.sum(1) > 0].mean(), abs=1e-6)
            assert picture['accuracy'] == pytest.approx(np.trace(one) / one.sum(), abs=1e-6)
        if 'prediction' in picture:
            kept = [Path(runner.log_dir, 'evaluation', picture[name]) for name in ('prediction', 'truth_map')]
            found = [torch.from_numpy(cv2.imread(str(path), -1)).long() for path in kept]
            assert torch.equal(found[0], predicted) and torch.equal(found[1], truth)
    assert not confusion.any() and record['pictures'][-1]['mIoU'] is None
    order = sorted(scores, key=scores.get)
    kept = {i for i, picture in enumerate(record['pictures']) if 'prediction' in picture}
    assert kept == {*order[:2], *order[-2:]}
    # mmseg's own segmentor has no confidence; the test put the switch back.
    model = runner.model.module if options.get('tta') else runner.model
    assert (record['calibration'] is None) == (options.get('type') == 'EncoderDecoder')
    assert not model.test_cfg.get('confidence')


def test_calibration_is_that_of_the_pixels(tmp_path):
    runner = make_runner(tmp_path)
    runner.test()
    calibration = record_of(runner)['calibration']
    runner.model.test_cfg['confidence'] = True
    confidence, right = [], []
    for batch in runner.test_dataloader:
        for sample in runner.model.test_step(batch):
            truth = sample.gt_sem_seg.data
            counted = truth != 255
            confidence.append(sample.seg_confidence.data[counted])
            right.append((sample.pred_sem_seg.data == truth)[counted])
    confidence, right = torch.cat(confidence).double().numpy(), torch.cat(right).numpy()
    of_bin = np.clip(np.floor(confidence * 20), 0, 19)
    ece = sum(
        abs(confidence[of_bin == k].mean() - right[of_bin == k].mean()) * (of_bin == k).mean()
        for k in np.unique(of_bin)
    )
    assert sum(one['pixels'] for one in calibration['bins']) == len(right)
    assert calibration['ece'] == pytest.approx(ece, abs=2e-4) and ece > 0.01
    for one in calibration['bins']:
        if one['pixels'] > 50:
            assert one['low'] - 1e-4 <= one['confidence'] <= one['high'] + 1e-4


def test_without_labels_there_is_no_record_and_the_test_goes_on(tmp_path):
    runner = make_runner(tmp_path, labels=False)
    runner.test()
    assert len(list((tmp_path / 'out').glob('*.png'))) == PICTURES
    assert not Path(runner.log_dir, 'evaluation').exists()
    assert log_of(runner).count('test: no evaluation record (the data has no truth)') == 1


def test_a_record_that_cannot_be_written_is_a_warning(tmp_path):
    runner = make_runner(tmp_path)
    Path(runner.log_dir, 'evaluation').write_text('in the way')
    assert runner.test()['mIoU'] > 0
    assert 'WARNING - test: the evaluation record could not be written' in log_of(runner)


def test_odd_predictions_are_a_line_in_the_log(tmp_path):
    runner = make_runner(tmp_path)
    step = runner.model.test_step

    def halved(data):
        for sample in (samples := step(data)):
            sample.pred_sem_seg = PixelData(data=sample.pred_sem_seg.data[:, ::2])
        return samples

    runner.model.test_step = halved
    runner.test_loop.evaluator.metrics[0].format_only = True  # mmseg's metric cannot compare them
    runner.test()
    assert record_of(runner) is None
    assert 'no evaluation record (prediction (24, 64) and truth (48, 64) have different sizes)' in log_of(runner)


def test_training_leaves_a_record_of_each_validation(tmp_path):
    config = small_config(tmp_path, train_cfg__max_iters=2, train_cfg__val_interval=1)
    runner = build_runner(config)
    runner.train()
    rows = [json.loads(line) for line in Path(runner.log_dir, 'vis_data/scalars.json').read_text().splitlines()]
    printed = {row['step']: row['mIoU'] for row in rows if 'mIoU' in row}
    records = {n: record_of(runner, f'val_iter_{n}') for n in (1, 2)}
    for n, record in records.items():
        assert record['iteration'] == n and record['kind'] == 'val' and record['checkpoint'] is None
        assert record['calibration'] is None  # asked for in tests only
        assert percent(iou_of(np.array(record['confusion']))) == pytest.approx(printed[n], abs=1e-4)
    # Pictures are kept of the newest and of the best one.
    best = max(records, key=lambda n: records[n]['metrics']['mIoU'])
    kept = {path.name for path in Path(runner.log_dir, 'evaluation/pictures').iterdir()}
    assert {'val_iter_2', f'val_iter_{best}'} >= kept >= {'val_iter_2'}
    page = write_report([runner.work_dir]).read_text()
    assert 'Validation of iteration 2' in page and 'VOLO LeanUPerHead' in page and 'StreetSceneDataset' in page
    assert page.count('<img') == 2 * 4  # two pictures of four panels


@pytest.mark.slow
def test_two_processes_leave_the_record_of_one(tmp_path):
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
    # Three pictures on two processes: the sampler repeats the first.
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
