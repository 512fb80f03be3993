"""Videos for tests: PyAV writes them, OpenCV reads results back with an FFmpeg of its own."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

_TICKS = 1000  # a second, where the test says when frames are shown
_RATE = 48000  # samples of sound a second
# Encoder and pixel format by container. MJPEG takes sides of odd length and keeps frames apart: damage stays local.
_ENCODERS = {'.avi': ('mjpeg', 'yuvj420p'), '.webm': ('libvpx', 'yuv420p'), '.mpg': ('mpeg2video', 'yuv420p')}


def frame(number: int, height: int, width: int) -> np.ndarray:
    """A smooth scene (height, width, 3) uint8, BGR, with a white bar as long as the frame's number says."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 200 // height, columns * 200 // width, (rows + columns + 3 * number) % 200], axis=-1)
    image[4:12, : 4 * (number % 16) + 4] = 255
    return image.astype(np.uint8)


def draw_video(path: Path, frames: int = 12, height: int = 64, width: int = 96, rate: float = 25.0, **more) -> Path:
    """A video of :func:`frame`; ``more`` as for :func:`write_video`."""
    return write_video(path, [frame(number, height, width) for number in range(frames)], rate, **more)


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    rate: float = 25.0,
    times: Sequence[float] | None = None,
    sound: str | None = None,
    layout: str = 'stereo',
    rotation: int = 0,
    aspect: Fraction | None = None,
    title: str = '',
) -> Path:
    """Write frames to a video file.

    Args:
        path: the suffix chooses container and codec.
        frames: (H, W, 3) uint8, BGR.
        rate: frames a second.
        times: seconds at which the frames are shown, in whole milliseconds; by default those of the rate.
        sound: encoder of a tone that is as long as the frames; by default there is no sound.
        layout: the channels of the sound.
        rotation: degrees that a player turns the frames, counterclockwise, a multiple of 90.
        aspect: width of a pixel over its height.
        title: of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), 'w') as container:
        container.metadata['title'] = title
        codec, pixels = _ENCODERS.get(path.suffix, ('libx264', 'yuv420p'))
        exact = Fraction(rate).limit_denominator(1001)
        options = dict(crf='12') if codec == 'libx264' else dict(qscale='2')
        video = container.add_stream(codec, rate=exact, options=options)
        video.height, video.width, video.pix_fmt = *frames[0].shape[:2], pixels
        video.codec_context.time_base = Fraction(1, _TICKS) if times else 1 / exact
        if codec != 'libx264':
            video.codec_context.bit_rate = 4_000_000
        if rotation:
            video.set_display_rotation(rotation)
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        tone = container.add_stream(sound, rate=_RATE, layout=layout) if sound else None
        for number, image in enumerate(frames):
            one = av.VideoFrame.from_ndarray(image, 'bgr24')
            one.time_base = video.codec_context.time_base
            one.pts = round(times[number] * _TICKS) if times else number
            container.mux(video.encode(one))
            if tone is not None:
                container.mux(tone.encode(_tone(number, exact, layout)))
        for stream in container.streams:
            container.mux(stream.encode())
    return path


def _tone(number: int, rate: Fraction, layout: str) -> av.AudioFrame:
    """The sound of one frame: 440 Hz."""
    first, last = (round(n / rate * _RATE) for n in (number, number + 1))
    wave = np.sin(2 * np.pi * 440 * np.arange(first, last) / _RATE)
    samples = np.stack([wave] * av.AudioLayout(layout).nb_channels).astype(np.float32) / 2
    one = av.AudioFrame.from_ndarray(samples, 'fltp', layout)
    one.sample_rate, one.pts, one.time_base = _RATE, first, Fraction(1, _RATE)
    return one


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """Every frame (H, W, 3) uint8, BGR, of a video that plays to its end, and its rate, as OpenCV reads them."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    assert capture.isOpened(), path
    count, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (one := capture.read())[0]:
        frames.append(one[1])
    assert len(frames) == count
    return frames, rate


def times_of(path: Path) -> list[float]:
    """Seconds at which the frames are shown."""
    with av.open(str(path)) as container:
        return [one.time for one in container.decode(video=0)]


def sound_of(path: Path) -> list[tuple[float, bytes]]:
    """Time in seconds and data of each packet of the sound."""
    with av.open(str(path)) as container:
        packets = container.demux(audio=0)
        return [(float(one.pts * one.time_base), bytes(one)) for one in packets if one.pts is not None]
