"""Overlay videos: each frame predicted and painted, with a legend below it.

PyAV, with the FFmpeg in it, reads and writes. Frames are streamed: memory does not grow with the length of a video.
"""

import contextlib
import errno
import itertools
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
from tqdm import tqdm

from ..utils.ahead import ahead
from ..utils.files import part_of
from ..utils.signals import Stopped, StopSignals
from .predictor import Predictor
from .visualize import column_width, entries_of, legend, overlay, strip_width, text_size

PREPARED_AHEAD = 2**22  # pixels: the views of a larger image would take too much memory beside those being predicted
_CONTAINERS = 'mp4 m4v mov avi mkv webm mpg mpeg mts m2ts wmv flv 3gp ogv'
VIDEO_SUFFIXES = tuple(f'.{name}' for name in _CONTAINERS.split())
# Encoders and their options by output format; the first one that FFmpeg has is used. The wheels of PyAV have both.
# libx264 is under the GPL, and some builds of FFmpeg leave it out: they get VP9 in MP4, which browsers play too.
_VP9 = {'libvpx-vp9': {'crf': '30', 'deadline': 'realtime', 'cpu-used': '8', 'row-mt': '1'}}
VIDEO_FORMATS = {'mp4': {'libx264': {'crf': '20', 'preset': 'veryfast'}, **_VP9}, 'webm': _VP9}
# Titles and the like need not be UTF-8. PyAV 19 takes them without this option.
_ANY_TEXT = {} if int(av.__version__.split('.')[0]) >= 19 else dict(metadata_errors='replace')
_HIGHEST_RATE, _DEFAULT_RATE = 240, Fraction(25)  # frames per second: what is believed; for files without a rate
_LONGEST_GAP, _CLOCK_ERROR = 10, 0.1  # seconds, forwards and backwards; more is a jump where the clock may jump
_SPARE = 2**23  # bytes of disk space kept free, so that the index of an unfinished file still fits
SLOTS = 24  # names that the legend has room for


class VideoLegend:
    """The legend strip below the frames of a video, of one size throughout.

    It names all classes if there are at most ``SLOTS``. Otherwise it names the classes seen last: the ``SLOTS`` most
    frequent classes of each frame are shown, and a class keeps its slot until another class needs it.

    Args:
        classes, palette: names and RGB colours.
        height, width: size of the frames in pixels.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Sequence[int]], height: int, width: int):
        self._entries = entries_of(classes, palette, np.arange(len(classes)))
        self._size = text_size(height, width)
        self._width = strip_width(width, self._size)
        self._column = column_width([name for name, _ in self._entries], self._size)
        self._few = len(classes) <= SLOTS
        self._slots: list[int | None] = list(range(len(classes))) if self._few else [None] * SLOTS
        self._seen = dict.fromkeys(range(len(classes)), -1)
        self._frame = 0
        self._strip = self._draw()

    def strip(self, labels: np.ndarray) -> np.ndarray:
        """The strip (h, w, 3) uint8, BGR, at least as wide as the frames, for a frame with class ids (H, W)."""
        if not self._few and self._assign(labels):
            self._strip = self._draw()
        return self._strip

    def _assign(self, labels: np.ndarray) -> bool:
        """Give slots to the frame's most frequent classes; return whether a slot changed."""
        counts = np.bincount(labels.ravel(), minlength=len(self._entries))
        wanted = [int(label) for label in np.argsort(-counts, kind='stable')[:SLOTS] if counts[label]]
        self._frame += 1
        self._seen.update(dict.fromkeys(wanted, self._frame))
        new = [label for label in wanted if label not in self._slots]
        for label in new:
            oldest = min(range(SLOTS), key=lambda slot: -2 if (held := self._slots[slot]) is None else self._seen[held])
            self._slots[oldest] = label
        return bool(new)

    def _draw(self) -> np.ndarray:
        entries = [self._entries[slot] if slot is not None else ('', ()) for slot in self._slots]
        return legend(self._width, entries, self._size, self._column)


def predict_video(
    predictor: Predictor,
    source: Path,
    target: Path,
    with_legend: bool = True,
    opacity: float = 0.5,
    stop: StopSignals | None = None,
) -> str | None:
    """Predict the frames of a video and write them with the colours of the classes over them.

    While the model predicts a frame, the next one is read and prepared, and the last one is painted and written.
    Each frame is shown when the source shows it, so a variable frame rate stays variable; times start at 0. The sound
    is copied as it is. Frames are turned upright as the metadata of the source say. H.264 for browsers needs sides of
    even length: the last row or column is repeated where that is necessary. The output has a temporary name until it
    can be played.

    Args:
        predictor: the model.
        source: any video that FFmpeg reads.
        target: ends in ``.mp4`` (H.264, with the index at the start) or ``.webm`` (VP9).
        with_legend: put a :class:`VideoLegend` below the frames.
        opacity: weight of the colours, from 0 to 1.
        stop: is polled; what was written until then stays.

    Returns:
        What users should know: the source is damaged or cut off, or its sound could not be copied. Else None.

    Raises:
        OSError: a file cannot be read, or cannot be written to its end.
        ValueError: the source is no video, or cannot be predicted. If some frames could be predicted, the message says
            that they were kept.
        Stopped: by ``stop``; the frames until then were kept, and a line on stderr says how many.
    """
    stop = stop or StopSignals()
    reader = _Reader(source)
    writer = _Writer(target, reader, predictor, with_legend, opacity)
    bar = tqdm(total=reader.count, unit='frame', desc=source.name, file=sys.stderr)

    def prepare(frame: _Frame) -> dict:
        return predictor.prepare(predictor.read_frame(frame.image))

    def load() -> Iterator[tuple[_Frame, dict | None]]:
        for frame in reader.frames():
            yield frame, prepare(frame) if frame.image.size <= 3 * PREPARED_AHEAD else None

    try:
        with contextlib.closing(ahead(load())) as frames, ThreadPoolExecutor(1) as pool:
            writing = pool.submit(int)  # nothing to write yet
            for frame, data in frames:
                stop.check()
                found = predictor.predict(prepare(frame) if data is None else data, stop.check)
                writing.result()
                writing = pool.submit(writer.add, frame, found.classes)
                bar.update()
            writing.result()
        if not writer.frames:
            raise ValueError('it is a video without a frame that can be read')
        writer.finish(reader.sound)
    except BaseException as error:
        bar.close()
        with contextlib.suppress(OSError):
            writer.finish()
        if not writer.frames:
            raise
        kept = f'{target} has the first {writer.frames}{f" of about {reader.count}" if reader.count else ""} frames'
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            tqdm.write(kept, file=sys.stderr)
            raise
        if isinstance(error, OSError):
            raise OSError(error.errno, f'{error.strerror or error}; {kept}', error.filename) from error
        raise ValueError(f'{str(error) or type(error).__name__}; {kept}') from error
    finally:
        bar.close()
        reader.close()
    return '; '.join(reader.notes) or None


class _Frame(NamedTuple):
    image: np.ndarray  # (H, W, 3) uint8, BGR
    time: int  # when it is shown, in time bases of the video stream
    duration: int
    sound: list[av.Packet]  # read between the frame before and this one


class _Reader:
    """The frames and the sound of a video file.

    Attributes:
        count: number of frames if the file tells it, else None.
        rate: average frame rate, frames per second.
        time_base: unit of the times of frames, in seconds.
        aspect: width of a pixel over its height; correct from the first frame on.
        sound_streams: the streams of the sound.
        sound: packets of sound that no frame has taken yet.
        notes: what is wrong with the file; complete after the last frame.
    """

    def __init__(self, path: Path):
        with path.open('rb') as file:
            if not file.read(1):
                raise ValueError('it is empty (0 bytes)')
        try:  # with an absolute path, because FFmpeg takes 'a:b.mp4' for a protocol 'a'
            self._container = av.open(os.path.abspath(path), **_ANY_TEXT)
        except av.FFmpegError as error:
            raise ValueError(
                'it is no video that FFmpeg can read, or it is cut off before the index that says where its frames are'
            ) from error
        self._video = self._container.streams.best('video')
        if self._video is None or self._video.codec_context is None:
            self.close()
            raise ValueError('it has no video stream that FFmpeg can decode')
        self._video.thread_type = 'AUTO'
        self.sound_streams = self._container.streams.audio
        rates = self._video.average_rate, self._video.guessed_rate
        self.rate = next((rate for rate in rates if rate and rate <= _HIGHEST_RATE), _DEFAULT_RATE)
        self.time_base = self._video.time_base
        # In a file that was cut off, the larger one is the length that it had before.
        self._length = max(self._video.frames / self.rate, Fraction(self._container.duration or 0, av.time_base))
        self._jumps = bool(self._container.format.flags & av.format.Flags.ts_discont.value)
        self.count = self._video.frames or round(self._length * self.rate) or None
        self.aspect = self._video.sample_aspect_ratio or Fraction(1)
        self.sound: list[av.Packet] = []
        self.notes: list[str] = []
        self._end = Fraction(0)  # seconds read so far

    def frames(self) -> Iterator[_Frame]:
        """Decode the frames, in the order in which they are shown."""
        step = max(1, round(1 / self.rate / self.time_base))
        last, shape, damages = -step, None, []
        for packet in itertools.chain(self._packets(), [None]):  # None makes the decoder give what it holds back
            if packet is not None and packet.stream.type == 'audio':
                self.sound.append(packet)
                continue
            damaged, decoded = packet is not None and packet.is_corrupt, []
            try:
                decoded = self._video.decode(packet)
            except av.error.InvalidDataError:
                damaged = True
            if damaged or any(frame.is_corrupt for frame in decoded):
                damages.append(self._end)
            for frame in decoded:
                turns = round(frame.rotation / 90)  # counterclockwise, from the metadata
                image = np.ascontiguousarray(np.rot90(frame.to_ndarray(format='bgr24'), turns))
                if shape is None:
                    shape, self.aspect = image.shape[:2], 1 / self.aspect if turns % 2 else self.aspect
                elif image.shape[:2] != shape:
                    image = cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA)
                # In damaged files, and in formats that store only decoding times, times are missing or go back.
                known = [time for time in (frame.pts, frame.dts) if time is not None]
                last = next((time for time in known if time > last), last + (1 if known else step))
                sound, self.sound = self.sound, []
                yield _Frame(image, last, frame.duration or step, sound)
        length, end = float(self._length), float(self._end)
        if not self._jumps and end < 0.98 * length - 2 / self.rate:  # formats with jumps do not store a length
            self.notes.append(f'it is cut off or damaged: it should last {length:.1f} s, only {end:.1f} s can be read')
        if damages:
            self.notes.append(f'damaged places: {len(damages)}, the first at {float(damages[0]):.1f} s')

    def _packets(self) -> Iterator[av.Packet]:
        """Packets of the video and its sound, with times that start at 0 and go on past jumps of the clock."""
        shift = -Fraction(self._container.start_time or 0, av.time_base)
        ends: dict[int, Fraction] = {}
        with contextlib.suppress(av.error.InvalidDataError):  # FFmpeg finds nothing more behind the damage
            for packet in self._container.demux(self._video, *self.sound_streams):
                start = packet.pts if packet.dts is None else packet.dts
                if start is None:  # the last one of each stream, which is empty
                    continue
                base, stream, duration = packet.time_base, packet.stream.index, packet.duration or 0
                time = start * base + shift
                if self._jumps and not -_CLOCK_ERROR <= time - ends.setdefault(stream, time) <= _LONGEST_GAP:
                    shift += ends[stream] - time
                ends[stream] = (start + duration) * base + shift
                for name in ('pts', 'dts'):
                    if (ticks := getattr(packet, name)) is not None:
                        setattr(packet, name, ticks + round(shift / base))
                        self._end = max(self._end, (ticks + duration) * base + shift)
                yield packet

    def close(self) -> None:
        self._container.close()


class _Writer:
    """Paint frames and write them, with the sound, under a temporary name.

    Attributes:
        frames: number of frames written; 0 if the file could not be finished.
    """

    def __init__(self, path: Path, reader: _Reader, predictor: Predictor, with_legend: bool, opacity: float):
        self.frames = 0
        self._path, self._part = path, part_of(path)
        self._reader, self._predictor, self._with_legend, self._opacity = reader, predictor, with_legend, opacity
        self._container: av.container.OutputContainer | None = None
        self._sound: dict[int, av.AudioStream] = {}  # by the index of the stream that is copied
        self._heard: dict[int, int] = {}  # decoding time of the last packet of sound

    def add(self, frame: _Frame, classes: np.ndarray) -> None:
        """Write the sound before a frame, and the frame with its class ids (H, W)."""
        if self.frames % 32 == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._path.parent).free < _SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        image = overlay(frame.image, classes, self._predictor.palette, self._opacity)
        if self._with_legend:
            if self._container is None:
                self._below = VideoLegend(self._predictor.classes, self._predictor.palette, *image.shape[:2])
            strip = self._below.strip(classes)
            beside = strip.shape[1] - image.shape[1]
            image = cv2.copyMakeBorder(image, 0, 0, 0, beside, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            image = np.concatenate((image, strip))
        height, width = image.shape[:2]
        image = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        painted = av.VideoFrame.from_ndarray(image, 'bgr24')
        painted.pts, painted.duration, painted.time_base = frame.time, frame.duration, self._reader.time_base
        with self._named_errors():
            if self._container is None:
                self._container = self._open(*image.shape[:2])
            self._mux(self._container, frame.sound, painted)
        self.frames += 1

    def _open(self, height: int, width: int) -> av.container.OutputContainer:
        encoders, reader = VIDEO_FORMATS[self._path.suffix[1:]], self._reader
        encoder = next((name for name in encoders if name in av.codecs_available), None)
        if encoder is None:
            raise ValueError(f'the FFmpeg of PyAV cannot write {self._path.suffix}: it has no {" or ".join(encoders)}')
        # The index is moved to the start: browsers can then play the file while they load it.
        container = av.open(os.path.abspath(self._part), 'w', container_options={'movflags': '+faststart'})
        self._video = container.add_stream(encoder, rate=reader.rate, options=dict(encoders[encoder]))
        codec = self._video.codec_context
        codec.height, codec.width, codec.pix_fmt = height, width, 'yuv420p'
        codec.time_base, codec.sample_aspect_ratio = reader.time_base, reader.aspect
        codec.colorspace, codec.color_range = 6, 1  # SMPTE 170M, limited range: what PyAV converts BGR to
        for stream in reader.sound_streams:
            try:  # Matroska and AVI do not name the channels of PCM; without names MP4 fails at the end of the file
                layout = {'1 channels': 'mono', '2 channels': 'stereo'}.get(stream.layout.name, stream.layout.name)
                if layout.endswith(' channels'):
                    raise ValueError(layout)
                self._sound[stream.index] = copy = container.add_stream_from_template(stream)
                copy.codec_context.layout = layout
            except (AttributeError, ValueError):  # FFmpeg does not know the codec, or the format cannot hold it
                reader.notes.append(f'its sound ({stream.name}) is left out: {self._path.suffix} cannot hold it')
        return container

    def _mux(
        self, container: av.container.OutputContainer, sound: list[av.Packet], frame: av.VideoFrame | None
    ) -> None:
        for packet in sound:
            stream = packet.stream.index
            if stream in self._sound and packet.dts is not None and packet.dts > self._heard.get(stream, -math.inf):
                self._heard[stream] = packet.dts
                packet.stream = self._sound[stream]
                with contextlib.suppress(av.error.InvalidDataError):  # damaged sound does not end the video
                    container.mux(packet)
        container.mux(self._video.encode(frame))

    def finish(self, sound: Sequence[av.Packet] = ()) -> None:
        """Complete the file and move it to its place; do nothing if that was done, or nothing was written.

        Args:
            sound: what follows the last frame.

        Raises:
            OSError: not all of it could be written; nothing of it stays.
        """
        container, self._container = self._container, None
        if container is None:
            return
        try:
            with self._named_errors(), container:  # leaving the container writes the index
                self._mux(container, sound, None)
            os.replace(self._part, self._path)
        except BaseException:
            self.frames = 0
            raise
        finally:
            self._part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Let errors of FFmpeg name the file that users know."""
        try:
            yield
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
