"""The check of all files, the quick check before training, and the command that runs them."""

import csv
import json
import re
import runpy
from ast import literal_eval
from pathlib import Path

import cv2
import numpy as np
import pytest
from faulty_data import (
    BINARY,
    CLASSES,
    FAULTS,
    LABEL,
    dataset_config,
    random_image,
    random_label,
    write,
    write_labels,
    write_masks,
)
from mmengine.config import Config
from PIL import Image

from mmseg_volo.datasets.checks.check import check_config, check_not_empty, check_split, quick_check
from mmseg_volo.errors import DataError

ROOT = Path(__file__).resolve().parents[3]
IGNORED = np.full_like(random_label(0), 255)


def config(root: Path, **options) -> Config:
    """A config with both splits; ``options`` are those of a split's data set, by its name."""
    loaders = {
        f'{split}_dataloader': dict(dataset=dataset_config(root, split, **options.get(split, {})))
        for split in ('train', 'val')
    }
    return Config(dict(**loaders, test_dataloader=loaders['val_dataloader']))


def faults(root: Path, **options) -> list:
    return [finding for report in check_config(config(root, **options), workers=1) for finding in report.faults]


def check_fault(data: Path, name: str) -> None:
    fault = FAULTS[name]
    fault.spoil(data)
    found = [finding for finding in faults(data, train=fault.options) if finding.path == str(data / fault.path)]
    assert fault.kind in {finding.kind for finding in found}
    cfg = dataset_config(data, **fault.options)
    if fault.quick:
        with pytest.raises(DataError) as caught:
            quick_check(cfg)
        assert str(data / fault.path) in str(caught.value)
    else:
        quick_check(cfg)


# One fault of each kind; the test of all is slow.
KINDS = {fault.kind: name for name, fault in FAULTS.items() if name != 'unreadable for permissions'}


@pytest.mark.parametrize('name', KINDS.values())
def test_each_kind_of_fault_is_found_with_its_file(data, name):
    check_fault(data, name)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAULTS)
def test_every_fault_is_found_with_its_file(data, name):
    check_fault(data, name)


def test_there_are_more_than_forty_faults():
    assert len(FAULTS) > 40 and len(KINDS) >= 14


def test_valid_data_has_no_findings(data):
    reports = check_config(config(data), workers=2)
    assert [report.split for report in reports] == ['train', 'val']  # test is val
    assert not [finding for report in reports for finding in report.findings]
    for split, report in zip(('train', 'val'), reports, strict=True):
        labels = [np.array(Image.open(path)) for path in (data / 'labels' / split).iterdir()]
        assert report.files == report.labels == len(labels) and report.classes == CLASSES
        assert report.pixels.tolist() == [sum((ids == c).sum() for ids in labels) for c in range(4)]
        assert report.images.tolist() == [len(labels)] * 4
        assert report.ignored == sum((ids == 255).sum() for ids in labels)
        quick_check(dataset_config(data, split))
        check_not_empty(dataset_config(data, split))


def test_messages_say_what_to_do(data):
    assert 'it holds 6 .png); correct data_root, data_prefix and img_suffix' in str(
        faults(data, train=dict(img_suffix='.jpg'))[0]
    )
    write_masks(data, 100)
    assert 'looks like a mask in grey values' in str(faults(data, train=BINARY)[0])
    write_labels(data, lambda i: random_label(i, high=5))
    assert 'label value 4 (' in str(faults(data)[0]) and 'set reduce_zero_label=True' in str(faults(data)[0])
    write_labels(data, lambda i: random_label(i, high=7))
    found = str(faults(data, train=dict(reduce_zero_label=True))[0])
    assert 'label value 5 (' in found and 'write 1 to 4 for the classes and 0 for ignored pixels' in found
    write_labels(data, lambda i: random_label(i, high=34))
    found = str(faults(data, train=dict(metainfo=dict(classes=tuple(map(str, range(19))))))[0])
    assert 'Cityscapes label ids' in found and '0 to 18 in the file' in found


def test_many_faults_are_counted_and_the_first_named(data):
    write_labels(data, random_image)
    with pytest.raises(DataError, match=r'^6 files are missing or wrong \(tools/check_data.py') as caught:
        quick_check(dataset_config(data))
    assert str(caught.value).count('colours instead of class ids') == 5 and str(caught.value).endswith('and 1 more')


def test_class_without_pixels_is_a_warning(data):
    write_labels(data, lambda i: random_label(i, high=3))
    report = check_config(config(data), ['train'], workers=1)[0]
    assert not report.faults
    assert [(finding.path, finding.kind) for finding in report.warnings] == [('car', 'absent class')]


def test_all_ignored_sample_is_no_fault_while_another_file_has_labels(data):
    for i in range(5):
        write(data / f'labels/train/{i}.png', IGNORED)
    quick_check(dataset_config(data), num_files=1)
    write(data / 'labels/train/5.png', IGNORED)
    with pytest.raises(DataError, match='and of all others in'):
        quick_check(dataset_config(data), num_files=1)


def test_indices_may_leave_no_image(data):
    assert check_split('train', dataset_config(data, indices=2), workers=1).files == 2
    with pytest.raises(DataError, match='no image is listed'):
        check_not_empty(dataset_config(data, indices=0))


@pytest.fixture
def tool(capsys, monkeypatch):
    """Run the command in this process: its status and what it printed."""
    main = runpy.run_path(str(ROOT / 'tools/check_data.py'))['main']

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr('sys.argv', ['check_data.py', *map(str, arguments)])
        return main(), capsys.readouterr().out

    return run


def test_command_reports_plots_and_ends_with_a_status(data, tool):
    path = data / 'own.py'
    path.write_text(f'default_scope = "mmseg"\n{config(data).pretty_text}\nwork_dir = "{data}/work"\n')
    status, output = tool(path, '--workers', '1')
    assert status == 0 and '0 faults, 0 warnings' in output
    assert 'train: 6 images, 6 labels read' in output and '| road ' in output
    labels = np.concatenate([cv2.imread(str(one), -1).ravel() for one in (data / 'labels/train').iterdir()])
    share = [(labels == c).sum() / (labels != 255).sum() for c in range(len(CLASSES))]
    for name, power in (('fourth', 0.25), ('square', 0.5)):
        weights = literal_eval(re.search(rf'class_weight=(\[.*\])  # {name} root', output)[1])
        assert sum(w * p for w, p in zip(weights, share, strict=True)) == pytest.approx(1, abs=0.01)
        rare, common = np.argmin(share), np.argmax(share)
        assert weights[rare] / weights[common] == pytest.approx((share[common] / share[rare]) ** power, rel=0.02)
    plot = cv2.imread(str(data / 'work/check_data_train_val.png'))
    assert plot.shape[0] > 100 and len(np.unique(plot)) > 10

    for i in range(4):
        write(data / f'labels/train/{i}.png', random_image(i))
    (data / 'labels/val/0.png').unlink()
    status, output = tool(path, '--fix-report', data / 'fix.csv', '--plot', data / 'p.png', '--workers', '2')
    assert status == 1 and '5 faults, 0 warnings' in output and (data / 'p.png').is_file()
    assert 'fault: train: channels of a label (4)' in output and '... and 1 more' in output
    assert f'{data}/labels/train/2.png: the label has 3 channels' in output
    with (data / 'fix.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 and rows[-1]['path'] == f'{data}/labels/val/0.png' and rows[-1]['fault'] == 'True'
    assert not list(data.glob('.*.part*'))
    tool(path, '--fix-report', data / 'fix.jsonl', '--split', 'val', '--plot', data / 'p.png')
    assert [json.loads(line)['kind'] for line in (data / 'fix.jsonl').read_text().splitlines()] == ['missing label']
    gone = f'test_dataloader.dataset.data_root={data}/gone'
    status, output = tool(path, '--split', 'test', '--plot', data / 'p.png', '--cfg-options', gone)
    assert status == 1 and f'{data}/gone/images/val: there is no such file or folder' in output
    with pytest.raises(SystemExit):
        tool(path, '--workers', '0')


def test_command_ends_with_status_1_on_a_fault(data, capsys, monkeypatch):
    (data / LABEL).unlink()
    path = data / 'own.py'
    path.write_text(f'{config(data).pretty_text}\n')
    monkeypatch.setattr('sys.argv', ['check_data.py', str(path), '--plot', str(data / 'p.png')])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / 'tools/check_data.py'), run_name='__main__')
    assert ended.value.code == 1 and f'{data / LABEL}: the label is missing' in capsys.readouterr().out


def test_drawn_scenes_are_valid(data, tool):
    options = [
        f'{part}_dataloader.dataset.{option}'
        for part in ('train', 'val', 'test')
        for option in (f'data_root={data}/scenes', 'train=4', 'val=2', 'size=(64,128)')
    ]
    status, output = tool(ROOT / 'configs/volo_d1_quickstart.py', '--plot', data / 'p.png', '--cfg-options', *options)
    assert status == 0 and ' 0 faults' in f' {output.splitlines()[-1]}' and 'val: 2 images, 2 labels' in output


def test_camvid_is_valid(camvid, tmp_path, tool):
    options = [f'{part}_dataloader.dataset.data_root={camvid}' for part in ('train', 'val', 'test')]
    path = ROOT / 'configs/volo_d1_camvid.py'
    status, output = tool(path, '--plot', tmp_path / 'p.png', '--cfg-options', *options)
    assert status == 0 and '0 faults, 0 warnings' in output
    assert 'train: 367 images, 367 labels read' in output and 'val: 101 images, 101 labels read' in output
