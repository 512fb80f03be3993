"""Overlay videos: what they show, how long they last, what becomes of broken ones, and of those that are stopped."""

import os
import resource
import signal
import sys

import cv2
import numpy as np
import pytest
import torch
from drawn_videos import draw_video, frame, frames_of, turn, vary_rate, write
from mmengine.config import Config
from small_runs import write_config

from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model
from mmseg_volo.inference.video import SLOTS, VideoLegend, predict_video
from mmseg_volo.inference.visualize import overlay
from mmseg_volo.utils.signals import Stopped, StopSignals


@pytest.fixture(scope='module')
def predictor(tmp_path_factory) -> Predictor:
    folder = tmp_path_factory.mktemp('video')
    config = Config.fromfile(write_config(folder))
    torch.manual_seed(0)
    model = init_model(config, device='cpu')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)), folder / 'small.pth')
    return Predictor(config, str(folder / 'small.pth'), 'cpu')


def difference(picture: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(picture.astype(int) - expected).mean())


@pytest.mark.parametrize('size', [(64, 96), (73, 131)], ids=str)
@pytest.mark.parametrize('suffix', ['.mp4', '.webm'])
def test_each_frame_is_the_overlay_of_its_own(suffix, size, predictor, tmp_path):
    source = draw_video(tmp_path / f'a{".avi" if size[0] % 2 else suffix}', 12, *size, rate=29.97)
    target = tmp_path / f'out/a_overlay{suffix}'
    assert predict_video(predictor, source, target, opacity=0.7) is None
    frames, rate = frames_of(target)
    read, _ = frames_of(source)
    assert len(frames) == len(read) == 12 and abs(rate - 29.97) < 0.01
    below = VideoLegend(predictor.classes, predictor.palette, *read[0].shape[:2]).strip(np.zeros(size, int))
    (height, width), wide = read[0].shape[:2], below.shape[1]
    expected = np.full((12, (height + len(below) + 1) // 2 * 2, (wide + 1) // 2 * 2, 3), 255, np.uint8)
    expected[:, height : height + len(below), :wide] = below
    for one, given in zip(expected, read, strict=True):
        one[:height, :width] = overlay(given, predictor(given), predictor.palette, 0.7)
    write(tmp_path / f'expected{suffix}', expected, rate=29.97)
    for found, one, as_coded in zip(frames, expected, frames_of(tmp_path / f'expected{suffix}')[0], strict=True):
        assert found.shape == one.shape
        assert difference(found, as_coded) < 0.5 and difference(found, one) < 12
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_without_a_legend_it_has_the_size_of_the_source(predictor, tmp_path):
    source = draw_video(tmp_path / 'a.mov', 5)
    predict_video(predictor, source, tmp_path / 'b.mp4', with_legend=False)
    assert {one.shape for one in frames_of(tmp_path / 'b.mp4')[0]} == {(64, 96, 3)}


def test_a_turned_video_is_predicted_as_it_is_seen(predictor, tmp_path):
    source = draw_video(tmp_path / 'a.mp4', 3)
    turn(source)
    predict_video(predictor, source, tmp_path / 'b.mp4', with_legend=False, opacity=0)
    frames, _ = frames_of(tmp_path / 'b.mp4')
    assert frames[0].shape == (96, 64, 3)
    assert difference(frames[0], cv2.rotate(frame(0, 64, 96), cv2.ROTATE_90_CLOCKWISE)) < 8


def test_a_varying_rate_keeps_its_time(predictor, tmp_path, capsys):
    source = draw_video(tmp_path / 'a.mp4', 30)
    vary_rate(source)
    assert predict_video(predictor, source, tmp_path / 'b.mp4', with_legend=False, opacity=0) is None
    frames, rate = frames_of(tmp_path / 'b.mp4')
    assert abs(len(frames) - 30) <= 1 and rate == 25  # the same length
    shown = [int(np.argmin([difference(one, frame(n, 64, 96)) for n in range(30)])) for one in frames]
    assert shown == sorted(shown) and len(set(shown[:10])) == 10 and shown[9] in (17, 18, 19)  # every second one
    assert len(set(shown[10:])) in (10, 11, 12) and shown[-1] == 29  # each of them twice


def test_broken_frames_and_cut_off_files_give_what_can_be_read(predictor, tmp_path):
    whole = draw_video(tmp_path / 'a.avi', 40, 128, 192).read_bytes()
    (tmp_path / 'cut.avi').write_bytes(whole[: len(whole) // 2])
    told = predict_video(predictor, tmp_path / 'cut.avi', tmp_path / 'cut.mp4', with_legend=False)
    frames, _ = frames_of(tmp_path / 'cut.mp4')
    assert 15 <= len(frames) <= 21
    assert f'it says that it has 40 frames, {len(frames)} could be read' in told and str(tmp_path / 'cut.mp4') in told
    broken = bytearray(whole)
    broken[len(whole) // 3 : len(whole) // 2] = bytes(len(whole) // 2 - len(whole) // 3)
    (tmp_path / 'broken.avi').write_bytes(broken)
    predict_video(predictor, tmp_path / 'broken.avi', tmp_path / 'broken.mp4', with_legend=False, opacity=0)
    frames, _ = frames_of(tmp_path / 'broken.mp4')
    assert difference(frames[-1], frame(39, 128, 192)) < 8  # it went on behind the damage


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', r'it is empty \(0 bytes\)'),
        (b'no video at all\n' * 99, 'it is no video that OpenCV can read'),
        (None, 'cut'),
    ],
    ids=['empty', 'text', 'no index'],
)
def test_what_is_no_video_is_refused_in_one_line(data, reason, predictor, tmp_path, capfd):
    source = draw_video(tmp_path / 'a.mp4')
    source.write_bytes(source.read_bytes()[:-300] if data is None else data)
    with pytest.raises(ValueError, match=reason):
        predict_video(predictor, source, tmp_path / 'out/b.mp4')
    assert capfd.readouterr().err == '' and not (tmp_path / 'out').exists()


def test_a_video_that_fails_midway_keeps_its_first_frames(predictor, tmp_path):
    source, calls = draw_video(tmp_path / 'a.mp4', 12), []

    class Failing:
        classes, palette, prepare = predictor.classes, predictor.palette, predictor.prepare

        def predict(self, *given):
            calls.append(given)
            if len(calls) == 8:
                raise RuntimeError('out of something')
            return predictor.predict(*given)

    with pytest.raises(ValueError, match=r'out of something; .*b\.mp4 has the first 7 of about 12 frames'):
        predict_video(Failing(), source, tmp_path / 'b.mp4')
    assert len(frames_of(tmp_path / 'b.mp4')[0]) == 7


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_a_file_that_plays(number, predictor, tmp_path, capfd):
    source, before = draw_video(tmp_path / 'a.mp4', 30), signal.getsignal(number)

    class Interrupted:
        classes, palette, predict = predictor.classes, predictor.palette, predictor.predict
        seen = 0

        def prepare(self, image):
            self.seen += 1
            if self.seen == 10:
                os.kill(os.getpid(), number)
            return predictor.prepare(image)

    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        predict_video(Interrupted(), source, tmp_path / 'b.mp4', stop=stop)
    assert stopped.value.status == 128 + number and signal.getsignal(number) is before
    frames, _ = frames_of(tmp_path / 'b.mp4')
    assert 7 <= len(frames) <= 10
    assert f'b.mp4 has the first {len(frames)} of about 30 frames' in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4', 'b.mp4']


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of a process')
def test_a_file_that_cannot_be_written_to_its_end_is_reported(predictor, tmp_path):
    source, before = draw_video(tmp_path / 'a.mp4', 40), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match='not all of the video could be written: is the disk full'):
            predict_video(predictor, source, tmp_path / 'b.mp4')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ['a.mp4']


def test_the_legend_of_many_classes_names_those_seen_last():
    classes, palette = [f'name {i}' for i in range(150)], np.random.default_rng(0).integers(0, 256, (150, 3)).tolist()
    shown = VideoLegend(classes, palette, 96, 128)
    first = shown.strip(np.arange(30).repeat(100).reshape(60, 50))
    again = shown.strip(np.arange(20).repeat(150).reshape(60, 50))
    assert again is first  # those still seen stay where they are, those gone remain until there is need
    later = shown.strip(np.arange(100, 103).repeat(1000).reshape(60, 50))
    assert later.shape == first.shape and (later != first).any()
    colours = {tuple(colour) for colour in later.reshape(-1, 3)}
    named = {i for i in range(150) if tuple(palette[i][::-1]) in colours}
    assert {100, 101, 102} <= named and len(named) == SLOTS and named - {100, 101, 102} <= set(range(24))
    assert len(named & set(range(20))) >= 19  # the four seen longest ago gave up their places first


def test_the_legend_of_few_classes_never_changes():
    shown = VideoLegend(['a', 'b'], [[255, 0, 0], [0, 255, 0]], 60, 90)
    assert shown.strip(np.zeros((60, 90), int)) is shown.strip(np.ones((60, 90), int))
