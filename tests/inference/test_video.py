"""Overlay videos: what they show and when, their sound, damaged sources, and videos that are stopped."""

import os
import re
import resource
import signal
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from drawn_videos import draw_video, frame, frames_of, sound_of, times_of
from mmengine.config import Config
from small_runs import write_config

from mmseg_volo.inference import Predictor, video
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


def difference(image: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(image.astype(int) - expected).mean())


def numbers_of(path, count: int) -> list[int]:
    """Which drawn frame each frame of a video shows."""
    drawn = [frame(number, 64, 96) for number in range(count)]
    return [int(np.argmin([difference(one, known) for known in drawn])) for one in frames_of(path)[0]]


@pytest.fixture
def plain(predictor):
    """Options that leave the frames as they are."""
    return dict(with_legend=False, opacity=0)


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
    for found, given in zip(frames, read, strict=True):
        expected = np.full(((height + len(below) + 1) // 2 * 2, (wide + 1) // 2 * 2, 3), 255, np.uint8)
        expected[height : height + len(below), :wide] = below
        expected[:height, :width] = overlay(given, predictor(given), predictor.palette, 0.7)
        assert found.shape == expected.shape and difference(found, expected) < 8
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_without_a_legend_it_has_the_size_of_the_source(predictor, tmp_path):
    source = draw_video(tmp_path / 'a.mov', 5)
    predict_video(predictor, source, tmp_path / 'b.mp4', with_legend=False)
    assert {one.shape for one in frames_of(tmp_path / 'b.mp4')[0]} == {(64, 96, 3)}


def test_a_title_in_another_encoding_does_no_harm(predictor, plain, tmp_path):
    source = draw_video(tmp_path / 'a.avi', 3, title='Fahrt uber Land')
    data = source.read_bytes()
    assert b'Fahrt uber' in data
    source.write_bytes(data.replace(b'Fahrt uber', 'Fahrt über'.encode('latin-1')))
    assert predict_video(predictor, source, tmp_path / 'b.mp4', **plain) is None


def test_browsers_can_play_it_while_they_load_it(predictor, plain, tmp_path):
    source = draw_video(tmp_path / 'a.avi', 9, 73, 131)
    predict_video(predictor, source, tmp_path / 'b.mp4', **plain)
    data = (tmp_path / 'b.mp4').read_bytes()
    assert 0 < data.index(b'moov') < data.index(b'mdat')
    with av.open(str(tmp_path / 'b.mp4')) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ('h264', 'yuv420p')
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (6, 1)
    image = frames_of(tmp_path / 'b.mp4')[0][0]
    assert image.shape == (74, 132, 3) and difference(image[:73, :131], frame(0, 73, 131)) < 4  # colours as well
    assert difference(image[73], image[72]) < 4 and difference(image[:, 131], image[:, 130]) < 4


def test_without_libx264_it_is_vp9(predictor, plain, tmp_path, monkeypatch):
    source = draw_video(tmp_path / 'a.mp4', 4)
    monkeypatch.setattr(video.av, 'codecs_available', av.codecs_available - {'libx264'})
    predict_video(predictor, source, tmp_path / 'b.mp4', **plain)
    with av.open(str(tmp_path / 'b.mp4')) as container:
        assert container.streams.video[0].codec_context.name in ('vp9', 'libvpx-vp9')
    assert numbers_of(tmp_path / 'b.mp4', 4) == [0, 1, 2, 3]
    monkeypatch.setattr(video.av, 'codecs_available', {'mpeg4'})
    with pytest.raises(ValueError, match=r'cannot write \.mp4: it has no libx264 or libvpx-vp9'):
        predict_video(predictor, source, tmp_path / 'c.mp4', **plain)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4', 'b.mp4']


@pytest.mark.parametrize(
    ('rotation', 'seen'), [(-90, cv2.ROTATE_90_CLOCKWISE), (90, cv2.ROTATE_90_COUNTERCLOCKWISE), (180, cv2.ROTATE_180)]
)
def test_a_turned_video_is_predicted_as_it_is_seen(rotation, seen, predictor, plain, tmp_path):
    source = draw_video(tmp_path / 'a.mp4', 3, rotation=rotation, aspect=Fraction(4, 3))
    assert difference(frames_of(source)[0][0], cv2.rotate(frame(0, 64, 96), seen)) < 8  # OpenCV agrees
    predict_video(predictor, source, tmp_path / 'b.mp4', **plain)
    assert difference(frames_of(tmp_path / 'b.mp4')[0][0], cv2.rotate(frame(0, 64, 96), seen)) < 8
    with av.open(str(tmp_path / 'b.mp4')) as container:
        assert container.streams.video[0].sample_aspect_ratio == (Fraction(4, 3) if rotation == 180 else Fraction(3, 4))


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.webm'])
@pytest.mark.parametrize('target', ['b.mp4', 'b.webm'])
def test_frames_keep_their_times(target, suffix, predictor, plain, tmp_path):
    times = [0, 0.04, 0.07, 0.5, 0.501, 12.5, 12.54, 13.0]
    source = draw_video(tmp_path / f'a{suffix}', len(times), times=times)
    assert predict_video(predictor, source, tmp_path / target, **plain) is None
    assert times_of(tmp_path / target) == pytest.approx(times, abs=1e-9)
    capture, shown = cv2.VideoCapture(str(tmp_path / target), cv2.CAP_FFMPEG), []
    while capture.read()[0]:
        shown.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    assert shown == pytest.approx(times, abs=1e-3)


@pytest.mark.parametrize(
    ('source', 'codec', 'target'),
    [
        ('a.mp4', 'aac', 'b.mp4'),
        ('a.mkv', 'pcm_s16le', 'b.mp4'),
        ('a.flv', 'libmp3lame', 'b.mp4'),
        ('a.mkv', 'libopus', 'b.webm'),
    ],
)
def test_sound_is_copied(source, codec, target, predictor, plain, tmp_path):
    source = draw_video(tmp_path / source, 30, sound=codec)
    assert predict_video(predictor, source, tmp_path / target, **plain) is None
    given, copied = sound_of(source), sound_of(tmp_path / target)
    assert b''.join(data for _, data in copied) == b''.join(data for _, data in given) != b''
    early = times_of(tmp_path / target)[0] - times_of(source)[0]  # FLV does not begin at 0
    if codec == 'pcm_s16le':  # cut into other packets
        given, copied = given[:1], copied[:1]
    assert [time for time, _ in copied] == pytest.approx([time + early for time, _ in given], abs=2e-3)


@pytest.mark.parametrize(
    ('more', 'target'),
    [(dict(sound='aac'), 'b.webm'), (dict(sound='wavpack'), 'b.mp4'), (dict(sound='pcm_s16le', layout='5.1'), 'b.mp4')],
)
def test_sound_that_the_format_cannot_hold_is_left_out(more, target, predictor, plain, tmp_path):
    source = draw_video(tmp_path / 'a.mkv', 5, **more)
    told = predict_video(predictor, source, tmp_path / target, **plain)
    assert told == f'its sound ({more["sound"]}) is left out: {target[1:]} cannot hold it'
    assert len(times_of(tmp_path / target)) == 5


def test_a_clock_that_jumps_does_not_change_the_length(predictor, plain, tmp_path):
    part = draw_video(tmp_path / 'a.ts', 25, sound='aac')
    (tmp_path / 'b.ts').write_bytes(part.read_bytes() * 3)
    predict_video(predictor, tmp_path / 'b.ts', tmp_path / 'b.mp4', **plain)
    times = times_of(tmp_path / 'b.mp4')
    assert len(times) == 75 and min(np.diff(times)) > 0.03 and 2.95 < times[-1] - times[0] < 3.1
    assert 2.9 < sound_of(tmp_path / 'b.mp4')[-1][0] < 3.1


@pytest.mark.parametrize('suffix', ['.avi', '.mkv'])
def test_a_file_that_is_cut_off_gives_what_can_be_read(suffix, predictor, plain, tmp_path):
    whole = draw_video(tmp_path / f'a{suffix}', 50).read_bytes()
    (tmp_path / f'cut{suffix}').write_bytes(whole[: len(whole) // 2])
    told = predict_video(predictor, tmp_path / f'cut{suffix}', tmp_path / 'cut.mp4', **plain)
    times = times_of(tmp_path / 'cut.mp4')
    assert 18 <= len(times) <= 32
    read = re.match(r'it is cut off or damaged: it should last 2\.0 s, only (.*) s can be read', told)
    assert float(read[1]) == pytest.approx(times[-1] + 0.04, abs=0.06)


@pytest.mark.parametrize('suffix', ['.mp4', '.ts'])
def test_damage_is_told_and_passed_over(suffix, predictor, plain, tmp_path):
    broken = bytearray(draw_video(tmp_path / f'a{suffix}', 60, 64, 96, sound='aac').read_bytes())
    at, size = len(broken) // 2, len(broken) // 10
    broken[at : at + size] = bytes(size)
    (tmp_path / f'broken{suffix}').write_bytes(broken)
    told = predict_video(predictor, tmp_path / f'broken{suffix}', tmp_path / 'b.mp4', **plain)
    assert re.fullmatch(r'damaged places: \d+, the first at 1\.[1-9] s', told)
    times = times_of(tmp_path / 'b.mp4')
    assert 45 <= len(times) < 60 and times[-1] == pytest.approx(59 / 25, abs=0.05)
    assert sound_of(tmp_path / 'b.mp4')[-1][0] > 2.2


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', r'it is empty \(0 bytes\)'),
        (b'no video at all\n' * 99, 'it is no video that FFmpeg can read'),
        (None, 'cut off before the index'),
    ],
    ids=['empty', 'text', 'no index'],
)
def test_what_is_no_video_is_refused_in_one_line(data, reason, predictor, tmp_path, capfd):
    source = draw_video(tmp_path / 'a.mp4')
    source.write_bytes(source.read_bytes()[:-300] if data is None else data)
    with pytest.raises(ValueError, match=reason):
        predict_video(predictor, source, tmp_path / 'out/b.mp4')
    assert capfd.readouterr().err == '' and not (tmp_path / 'out').exists()


def test_sound_alone_is_no_video(predictor, tmp_path):
    source = draw_video(tmp_path / 'a.mp4', sound='aac')
    with av.open(str(source)) as container, av.open(str(tmp_path / 'b.mp4'), 'w') as target:
        copy = target.add_stream_from_template(container.streams.audio[0])
        for packet in container.demux(audio=0):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    with pytest.raises(ValueError, match='it has no video stream that FFmpeg can decode'):
        predict_video(predictor, tmp_path / 'b.mp4', tmp_path / 'c.mp4')


def test_a_video_that_fails_midway_keeps_its_first_frames(predictor, tmp_path):
    source, calls = draw_video(tmp_path / 'a.mp4', 12), []

    class Failing:
        classes, palette = predictor.classes, predictor.palette
        prepare, read_frame = predictor.prepare, predictor.read_frame

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
    source, before = draw_video(tmp_path / 'a.mp4', 30, sound='aac'), signal.getsignal(number)

    class Interrupted:
        classes, palette = predictor.classes, predictor.palette
        prepare, predict = predictor.prepare, predictor.predict
        seen = 0

        def read_frame(self, image):
            self.seen += 1
            if self.seen == 10:
                os.kill(os.getpid(), number)
            return predictor.read_frame(image)

    with pytest.raises(Stopped) as stopped, StopSignals() as stop:
        predict_video(Interrupted(), source, tmp_path / 'b.mp4', stop=stop)
    assert stopped.value.status == 128 + number and signal.getsignal(number) is before
    frames, _ = frames_of(tmp_path / 'b.mp4')
    assert 7 <= len(frames) <= 10
    assert 0 < sound_of(tmp_path / 'b.mp4')[-1][0] < len(frames) / 25 + 0.1
    assert f'b.mp4 has the first {len(frames)} of about 30 frames' in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a.mp4', 'b.mp4']


@pytest.mark.skipif(sys.platform == 'win32', reason='needs a limit of file sizes')
def test_a_file_that_cannot_be_written_to_its_end_is_reported(predictor, tmp_path):
    source, before = draw_video(tmp_path / 'a.mp4', 40), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/b\.mp4'"):
            predict_video(predictor, source, tmp_path / 'b.mp4')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ['a.mp4']


def test_a_disk_that_is_nearly_full_keeps_the_first_frames(predictor, plain, tmp_path, monkeypatch):
    source, free = draw_video(tmp_path / 'a.mp4', 40), iter([2**30, 2**20])
    monkeypatch.setattr(video.shutil, 'disk_usage', lambda _: SimpleNamespace(free=next(free)))
    with pytest.raises(OSError, match=r'No space left on device; .*b\.mp4 has the first 32 of about 40 frames'):
        predict_video(predictor, source, tmp_path / 'b.mp4', **plain)
    assert len(frames_of(tmp_path / 'b.mp4')[0]) == 32


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
