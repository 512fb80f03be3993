"""Prediction of folders and videos by tools/predict.py: results, messages, resume, signals, processes."""

import copy
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from drawn_videos import draw_video, frame, frames_of
from mmseg.registry import TRANSFORMS
from small_runs import ROOT, write_config

from mmseg_volo.cli import run_tool
from mmseg_volo.errors import ConfigError
from mmseg_volo.inference import Predictor
from mmseg_volo.inference import files as files_module
from mmseg_volo.inference.files import OutputError, Recipe, predict_files
from mmseg_volo.inference.model import init_model
from mmseg_volo.utils.config import load_config
from mmseg_volo.utils.signals import Stopped


@pytest.fixture(scope='module')
def model(tmp_path_factory) -> tuple[str, str]:
    """Return (config, checkpoint) of an untrained model."""
    folder = tmp_path_factory.mktemp('predict')
    path = str(write_config(folder))
    torch.manual_seed(0)
    built = init_model(path, device='cpu')
    torch.save(dict(state_dict=built.state_dict(), meta=dict(dataset_meta=built.dataset_meta)), folder / 'small.pth')
    return path, str(folder / 'small.pth')


@pytest.fixture
def recipe(model) -> Recipe:
    return Recipe(load_config(model[0]), model[1], 'cpu', options=dict(confidence=False))


def draw(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        cv2.imwrite(str(folder / f'{number}.png'), frame(number, 48 + 8 * number, 96))
    return folder


def main(*arguments, monkeypatch) -> int:
    spec = importlib.util.spec_from_file_location('predict_tool', ROOT / 'tools/predict.py')
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, 'argv', ['predict.py', *map(str, arguments)])
    return tool.main()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*.png')}


def test_overlays_have_a_legend_or_the_size_of_the_image(model, tmp_path, monkeypatch):
    images = draw(tmp_path / 'images')
    given = *model, images, '--device', 'cpu', '--overlay', '--out'
    assert main(*given, tmp_path / 'a', monkeypatch=monkeypatch) == 0
    assert main(*given, tmp_path / 'b', '--no-legend', '--opacity', '0.25', monkeypatch=monkeypatch) == 0
    palette = np.array(Predictor(*model, 'cpu').palette)
    for number in range(4):
        image = frame(number, 48 + 8 * number, 96)
        classes = cv2.imread(str(tmp_path / f'a/{number}.png'), -1)
        colours = palette[classes][..., ::-1]
        with_legend = cv2.imread(str(tmp_path / f'a/{number}_overlay.png')).astype(int)
        without = cv2.imread(str(tmp_path / f'b/{number}_overlay.png')).astype(int)
        height, width = image.shape[:2]
        assert without.shape == image.shape
        assert np.abs(without - (0.75 * image + 0.25 * colours)).max() <= 1
        assert np.abs(with_legend[:height, :width] - (image + colours) / 2).max() <= 1
        below = {tuple(colour) for colour in with_legend[height:].reshape(-1, 3)}
        assert {tuple(palette[c][::-1]) for c in np.unique(classes)} <= below
    for wrong in ('1.1', 'x', '-1'):
        with pytest.raises(SystemExit):
            main(*given, tmp_path / 'c', '--opacity', wrong, monkeypatch=monkeypatch)


def test_images_and_videos_together(model, tmp_path, monkeypatch, capsys):
    video, image = draw_video(tmp_path / 'a.mp4', 4), draw(tmp_path / 'p', 1) / '0.png'
    (tmp_path / 'empty.mp4').write_bytes(b'')
    (tmp_path / 'empty.png').write_bytes(b'')
    out = tmp_path / 'out'
    given = *model, video, image, tmp_path / 'empty.mp4', tmp_path / 'empty.png', '--out', out, '--device', 'cpu'
    assert main(*given, '--video-format', 'webm', monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err
    assert f'skipped {tmp_path}/empty.mp4: it is empty (0 bytes)' in told
    assert f'skipped {tmp_path}/empty.png: it is no image, or broken: it is empty (0 bytes)' in told
    assert '2 of the images failed' in told and 'Traceback' not in told
    assert sorted(p.name for p in out.iterdir()) == ['0.png', 'a_overlay.webm', 'predict.jsonl']
    assert len(frames_of(out / 'a_overlay.webm')[0]) == 4


def test_more_than_256_classes_are_written_in_16_bits(model, tmp_path):
    names = [f'class {i}' for i in range(300)]
    config = load_config(model[0])
    config.model.decode_head.num_classes = 300
    config.test_dataloader.dataset.metainfo = dict(classes=names, palette=[[i // 2, i % 256, 7] for i in range(300)])
    torch.manual_seed(0)
    built = init_model(config, device='cpu')
    with torch.no_grad():
        built.decode_head.conv_seg.bias[255:] += 9
    torch.save(dict(state_dict=built.state_dict(), meta=dict(dataset_meta=built.dataset_meta)), tmp_path / 'x.pth')
    predictor = Predictor(config, str(tmp_path / 'x.pth'), 'cpu')
    images = draw(tmp_path / 'images', 1)
    assert predict_files(predictor, [str(images)], str(tmp_path / 'out'), True, opacity=1) == {}
    ids = cv2.imread(str(tmp_path / 'out/0.png'), -1)
    assert ids.dtype == np.uint16 and np.array_equal(ids, predictor(images / '0.png'))
    assert len(np.unique(ids)) > 1 and ids.max() > 255
    colours = np.array(predictor.palette)[ids][..., ::-1]
    assert np.array_equal(cv2.imread(str(tmp_path / 'out/0_overlay.png'))[: ids.shape[0], : ids.shape[1]], colours)


def test_the_decoder_does_not_write_between_the_lines_of_the_bar(model, tmp_path, monkeypatch, capfd):
    image = np.dstack([frame(0, 48, 96), np.full((48, 96), 200, np.uint8)])
    cv2.imwrite(str(tmp_path / 'bands.tif'), image)  # OpenCV warns of tags in its own file
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)  # earlier tests have run the tool
    cv2.imread(str(tmp_path / 'bands.tif'))
    assert 'TIFF_Warning' in capfd.readouterr().err
    try:
        given = *model, tmp_path / 'bands.tif', '--device', 'cpu', '--out', tmp_path / 'out'
        with pytest.raises(SystemExit, match=r'^0$'):
            run_tool(lambda: main(*given, monkeypatch=monkeypatch))
    finally:
        cv2.utils.logging.setLogLevel(level)
    assert 'WARN' not in capfd.readouterr().err


def test_results_that_would_replace_one_another_are_refused(recipe, tmp_path):
    images = draw(tmp_path / 'images', 1)
    (images / '0_overlay.png').write_bytes((images / '0.png').read_bytes())
    with pytest.raises(FileExistsError, match=r'0\.png and .*0_overlay\.png would both be written to 0_overlay\.png'):
        predict_files(recipe, [str(images)], str(tmp_path / 'out'), True)
    assert predict_files(recipe, [str(images)], str(tmp_path / 'out')) == {}
    assert sorted(contents(tmp_path / 'out')) == ['0.png', '0_overlay.png']


def test_output_folders_that_cannot_be_written(recipe, tmp_path):
    images = draw(tmp_path / 'images', 1)
    (tmp_path / 'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file is a file; the results need a folder'):
        predict_files(recipe, [str(images)], str(tmp_path / 'file'))
    with pytest.raises(OSError, match='file/below'):
        predict_files(recipe, [str(images)], str(tmp_path / 'file/below'))
    before = contents(images)
    with pytest.raises(FileExistsError, match='would replace a source'):
        predict_files(recipe, [str(images)], str(images))
    assert contents(images) == before


@pytest.mark.skipif(sys.platform == 'win32', reason='needs resource limits')
def test_a_full_disk_ends_the_run_at_once(recipe, tmp_path, capsys):
    images, before = draw(tmp_path / 'images'), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
    try:
        with pytest.raises(
            OutputError,
            match=r'0_overlay\.png cannot be written .* 0 of 4 are done: free .*, then continue with --resume',
        ):
            predict_files(recipe, [str(images)], str(tmp_path / 'out'), True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['0.png', 'predict.jsonl']


@pytest.fixture
def predicted(monkeypatch) -> list[str]:
    """Collect the names of the images that are read; send SIGINT when STOP_AT is read."""
    names = []

    def read(predictor, path):
        names.append(path.name)
        if path.name == os.environ.get('STOP_AT'):
            os.kill(os.getpid(), signal.SIGINT)
        return original(predictor, path)

    original = Predictor.read
    monkeypatch.setattr(Predictor, 'read', read)
    return names


def test_resume_continues_a_folder(recipe, tmp_path, predicted, monkeypatch, capsys):
    images, out = draw(tmp_path / 'images', 8), tmp_path / 'out'
    run = lambda resume=True, where=out: predict_files(recipe, [str(images)], str(where), True, resume=resume)  # noqa: E731
    run(False, tmp_path / 'whole')
    monkeypatch.setenv('STOP_AT', '4.png')
    with pytest.raises(Stopped):
        run(False)
    done = len(list(out.glob('*_overlay.png')))
    assert 2 <= done <= 4 and f'{done} of 8 are done; run the same command with --resume' in capsys.readouterr().err
    monkeypatch.delenv('STOP_AT')
    predicted.clear()
    assert run() == {} and f'{done} done before, {8 - done} to do' in capsys.readouterr().err
    assert predicted == [f'{number}.png' for number in range(done, 8)]
    assert contents(out) == contents(tmp_path / 'whole') and not list(out.glob('.*'))

    predicted.clear()
    (out / '3_overlay.png').unlink()  # a removed result, a changed image and a new image
    cv2.imwrite(str(images / '5.png'), frame(20, 40, 96))
    cv2.imwrite(str(images / 'new.png'), frame(20, 40, 96))
    with (out / 'predict.jsonl').open('a') as file:
        file.write('{"source": "cut o')  # as after a power failure
    run()
    assert predicted == ['3.png', '5.png', 'new.png'] and '6 done before, 3 to do' in capsys.readouterr().err
    assert cv2.imread(str(out / '5.png'), -1).shape == (40, 96)
    predicted.clear()
    assert run() == {} and not predicted
    assert run(False) == {} and len(predicted) == 9  # without --resume everything is predicted again


def test_results_are_written_during_the_next_prediction_and_noted_after_that(recipe, tmp_path, monkeypatch):
    images, out = draw(tmp_path / 'images'), tmp_path / 'out'
    (images / '2.png').write_bytes(b'no image')
    events, predict, save = [], Predictor.predict, files_module._save

    def slow_save(*arguments):
        name = arguments[2].name
        if name == '0':
            while events.count('predicts') < 2:
                time.sleep(0.01)
        events.append(f'writes {name}')
        assert threading.current_thread() is not threading.main_thread()
        return save(*arguments)

    def note(manifest, source, files):
        assert all((out / file).is_file() for file in files)
        events.append(f'noted {source.name}')

    monkeypatch.setattr(files_module, '_save', slow_save)
    monkeypatch.setattr(Predictor, 'predict', lambda *arguments: events.append('predicts') or predict(*arguments))
    monkeypatch.setattr(files_module.Manifest, 'add', note)
    failed = predict_files(recipe, [str(images)], str(out))
    assert list(failed) == [images / '2.png']
    assert [event for event in events if event != 'predicts'] == [
        f'{what} {number}{end}' for number in (0, 1, 3) for what, end in (('writes', ''), ('noted', '.png'))
    ]


def test_resume_refuses_results_of_another_model_or_options(recipe, model, tmp_path, monkeypatch, capsys):
    images, out = draw(tmp_path / 'images', 1), tmp_path / 'out'
    predict_files(recipe, [str(images)], str(out))
    manifest = (out / 'predict.jsonl').read_bytes()
    other = tmp_path / 'other.pth'
    weights = torch.load(model[1])
    torch.save(dict(weights, more=1), other)
    config = load_config(model[0])
    config.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(43, 43))

    def refused(message, recipe=recipe, **options):
        with pytest.raises(ConfigError, match=message):
            predict_files(recipe, [str(images)], str(out), resume=True, **options)
        assert (out / 'predict.jsonl').read_bytes() == manifest

    refused(
        r'checkpoint \(small\.pth \w{8} then, other\.pth \w{8} now\)\. Choose', Recipe(recipe.config, str(other), 'cpu')
    )
    refused(
        r'with something else: config \(small\.py \w{8} then, small',
        Recipe(config, model[1], 'cpu', False, recipe.options),
    )
    refused(r'with something else: overlay \(no then, yes now\)\. Choose', with_overlay=True)
    refused(r'opacity \(0\.5 then, 0\.7 now\)', opacity=0.7)
    refused(r'aug-test \(no then, yes now\)', Recipe(recipe.config, model[1], 'cpu', True, recipe.options))
    shutil.copy(model[1], tmp_path / 'moved.pth')  # the same bytes
    same = Recipe(recipe.config, str(tmp_path / 'moved.pth'), 'cpu', False, dict(recipe.options, window_batch=1))
    assert predict_files(same, [str(images)], str(out), resume=True) == {}
    assert '1 done before, 0 to do' in capsys.readouterr().err
    with (out / 'predict.jsonl').open('a') as file:
        file.write('[' * 100_000 + '\n{"source": 5}\nnull\n')
    assert predict_files(same, [str(images)], str(out), resume=True) == {}
    for manifest in (b'nonsense', b'[' * 100_000):
        (out / 'predict.jsonl').write_bytes(manifest)
        refused('is no record of predictions; leave out --resume')
    predict_files(recipe, [str(images)], str(out))
    assert len((out / 'predict.jsonl').read_text().splitlines()) == 2
    json.loads((out / 'predict.jsonl').read_text().splitlines()[0])


def test_two_processes_give_the_results_of_one(model, recipe, tmp_path, monkeypatch, capsys):
    images, before = draw(tmp_path / 'images', 12), processes_of(os.getpid(), b'multiprocessing')
    (images / 'broken.png').write_bytes((images / '0.png').read_bytes()[:50])
    given = *model, images, '--device', 'cpu', '--overlay', '--out'
    assert main(*given, tmp_path / 'two', '--processes', '2', monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err
    assert told.count('skipped') == 1 and f'skipped {images}/broken.png: it is no image, or broken' in told
    assert main(*given, tmp_path / 'one', monkeypatch=monkeypatch) == 1
    assert contents(tmp_path / 'two') == contents(tmp_path / 'one') and len(contents(tmp_path / 'two')) == 24
    assert main(*given, tmp_path / 'two', '--resume', monkeypatch=monkeypatch) == 1
    assert '12 done before, 1 to do' in capsys.readouterr().err
    assert not [pid for pid in processes_of(os.getpid(), b'multiprocessing') if pid not in before]


@TRANSFORMS.register_module(force=True)
class Fails:
    """A transform that fails with each image of at most this height in pixels."""

    def __init__(self, height: int):
        self.height = height

    def __call__(self, results: dict) -> dict:
        if results['img'].shape[0] <= self.height:
            raise cv2.error('an odd\nreason')
        return results


@pytest.mark.parametrize(
    ('steps', 'message'),
    [
        ([], 'the pipeline packs no inputs; its last transform must be PackSegInputs'),
        ([dict(type='Fails', height=999)], 'error: an odd reason'),
        ([dict(type='Fails', height=63), dict(type='PackSegInputs')], None),  # the plain image is 64 pixels high
    ],
)
def test_a_config_that_predicts_no_image_is_one_error(steps, message, recipe, tmp_path):
    images = draw(tmp_path / 'images', 3)
    (images / '0.png').write_bytes(b'no image')
    config = copy.deepcopy(recipe.config)
    config.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), *steps]
    given = Recipe(config, recipe.checkpoint, 'cpu'), [str(images)], str(tmp_path / 'out')
    if message is None:
        assert [path.name for path in predict_files(*given)] == ['0.png', '1.png']
        return
    with pytest.raises(ConfigError, match=f'^small.py: no image can be predicted, not even a plain one.*: {message}$'):
        predict_files(*given)
    assert not list((tmp_path / 'out').glob('*.png'))


@pytest.mark.slow
def test_errors_of_workers_are_raised_as_they_are(recipe, model, tmp_path):
    images = draw(tmp_path / 'images')
    wrong = Recipe(recipe.config, str(tmp_path / 'gone.pth'), 'cpu')
    with pytest.raises(FileNotFoundError, match=r'gone\.pth'):
        predict_files(wrong, [str(images)], str(tmp_path / 'out'), processes=2)
    assert list((tmp_path / 'out').iterdir()) == []
    with pytest.raises(TypeError, match='need a Recipe'):
        predict_files(recipe.load(), [str(images)], str(tmp_path / 'out'), processes=2)


def command(model, *arguments) -> list[str]:
    tool = str(ROOT / 'tools/predict.py')
    return [sys.executable, '-W', 'ignore', tool, *model, *map(str, arguments), '--device', 'cpu']


def started(*arguments, model, out: Path) -> subprocess.Popen:
    """Start tools/predict.py in its own process group; return when it has written the first results."""
    process = subprocess.Popen(
        command(model, *arguments, '--out', out), stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    for _ in range(600):
        if process.poll() is not None or (out.is_dir() and len(list(out.glob('*'))) > 3):
            break
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()
    return process


def processes_of(parent: int, word: bytes) -> list[int]:
    """Find child processes by a word of their command line; zombies count too."""
    found = []
    for folder in Path('/proc').glob('[0-9]*'):
        try:
            state, its_parent = (folder / 'stat').read_text().rsplit(')', 1)[1].split()[:2]
            if int(its_parent) == parent and (state == 'Z' or word in (folder / 'cmdline').read_bytes()):
                found.append(int(folder.name))
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_ctrl_c_on_a_folder(processes, model, tmp_path):
    images, out = draw(tmp_path / 'images', 1), tmp_path / 'out'
    for number in range(400):
        shutil.copy(images / '0.png', images / f'copy{number}.png')
    process = started(images, '--processes', str(processes), model=model, out=out)
    workers = processes_of(process.pid, b'spawn_main')
    os.killpg(process.pid, signal.SIGINT)  # a terminal also signals the whole group
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'Traceback' not in told, told
    done = len((out / 'predict.jsonl').read_text().splitlines()) - 1
    assert f'{done} of 401 are done; run the same command with --resume to continue' in told
    assert len(contents(out)) >= done > 0 and not list(out.glob('.*'))
    assert len(workers) == (processes if processes > 1 else 0)
    assert not any(Path(f'/proc/{pid}').exists() for pid in workers)
    again = command(model, images, '--out', out, '--resume')
    ended = subprocess.run(again, capture_output=True, text=True, cwd=ROOT, check=False, timeout=120)
    assert ended.returncode == 0 and f'{done} done before, {401 - done} to do' in ended.stderr
    assert len(contents(out)) == 401


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='reads /proc')
def test_a_killed_worker_loses_only_its_images(model, tmp_path):
    images, out = draw(tmp_path / 'images', 1), tmp_path / 'out'
    for number in range(400):
        shutil.copy(images / '0.png', images / f'copy{number}.png')
    process = started(images, '--processes', '2', model=model, out=out)
    os.kill(processes_of(process.pid, b'spawn_main')[0], signal.SIGKILL)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and 'Traceback' not in told, told
    lost = [line for line in told.splitlines() if 'was ended by SIGKILL (out of memory?)' in line]
    assert 1 <= len(lost) <= 3 and all(line.startswith('skipped ') for line in lost)
    assert f'{len(lost)} of the images failed' in told
    assert len((out / 'predict.jsonl').read_text().splitlines()) == 1 + 401 - len(lost) and not list(out.glob('.*'))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_on_a_video(number, model, tmp_path):
    source, out = draw_video(tmp_path / 'a.mp4', 2000), tmp_path / 'out'
    process = subprocess.Popen(command(model, source, '--out', out), stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for _ in range(600):
        if list(out.glob('.a_overlay*')):
            break
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number and 'Traceback' not in told, told
    frames, _ = frames_of(out / 'a_overlay.mp4')
    assert 0 < len(frames) < 2000 and f'a_overlay.mp4 has the first {len(frames)} of about 2000 frames' in told
    assert sorted(p.name for p in out.iterdir()) == ['a_overlay.mp4', 'predict.jsonl']
