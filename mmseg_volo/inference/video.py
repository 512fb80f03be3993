"""Overlay videos: each frame predicted and painted, a legend below; read, predicted and written as a stream.

OpenCV and the FFmpeg in it read and write: whatever they can read, to MPEG-4 in .mp4 or VP8 in .webm.
"""

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..utils.signals import Stopped, StopSignals
from .predictor import Predictor
from .visualize import column_width, entries_of, legend, overlay, strip_width, text_size

# Read by OpenCV when it first opens a video: a damaged one is reported in one line, not in one for each block of it.
os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')
PREPARED_AHEAD = 2**22  # pixels: a larger picture's views would take too much memory beside those of the one at work
_CONTAINERS = 'mp4 m4v mov avi mkv webm mpg mpeg mts m2ts wmv flv 3gp ogv'
VIDEO_SUFFIXES = tuple(f'.{name}' for name in _CONTAINERS.split())
VIDEO_FORMATS = {'mp4': 'mp4v', 'webm': 'VP80'}  # what OpenCV's wheels can write on every system
_USUAL_RATE = 25.0  # frames a second, where a file does not say
_HIGHEST_RATE = 240.0  # of files that tell the truth about it
_LONGEST_GAP = 10.0  # seconds between frames, in files that do not say how long they are
_TRIES = 64  # reads past damage, each of which passes over up to 64 packets
_SPARE = 2**23  # bytes left on the disk, so that there is room for the index of a file that ends early
SLOTS = 24  # names that the legend has room for


class VideoLegend:
    """The strip below the frames of a video, of one size throughout.

    It names all classes where they are at most ``SLOTS``. Of more it names those seen last: each of the ``SLOTS`` most
    frequent classes of a frame is there, and keeps its place until another one needs it.

    Args:
        classes, palette: names, and RGB colours.
        height, width: of the frames.
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
        """The strip (h, w, 3) uint8, BGR, w at least the frames' width, for a frame with these class ids (H, W)."""
        if not self._few and self._assign(labels):
            self._strip = self._draw()
        return self._strip

    def _assign(self, labels: np.ndarray) -> bool:
        """Give the frame's most frequent classes their slots; whether anything changed."""
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
    """Predict a video's frames and write them with the classes' colours over them.

    The next frame is read and prepared, and the last one painted and written, while the model works on one; memory does
    not grow with the length. The video written has the frame rate of the source, and its length: where the source's
    rate varies, frames are held or left out. It has no sound, and sides of even length (the last row or column is
    repeated for that). Its name appears when it is complete, or as complete as it gets.

    Args:
        predictor: the model.
        source: any video that OpenCV reads.
        target: ends in ``.mp4`` (MPEG-4 part 2) or ``.webm`` (VP8).
        with_legend: put a :class:`VideoLegend` below the frames.
        opacity: weight of the colours, from 0 to 1.
        stop: is looked at often; what was written until then stays.

    Returns:
        A sentence where the source has fewer frames than it says, else None.

    Raises:
        OSError: a file that cannot be read, or written to its end.
        ValueError: no video, or one that cannot be predicted. Where some frames could be, the message says that they
            were kept.
        Stopped: by ``stop``; the frames until then were kept, and the progress bar's place says how many.
    """
    stop = stop or StopSignals()
    reader = _Reader(source)
    writer: _Writer | None = None
    bar = tqdm(total=reader.count, unit='frame', desc=source.name, file=sys.stderr)
    try:
        with contextlib.closing(_ahead(reader, predictor)) as frames, ThreadPoolExecutor(1) as pool:
            writing: Future | None = None
            for frame, steps, data in frames:
                stop.check()
                found = predictor.predict(predictor.prepare(frame) if data is None else data, stop.check)
                if writer is None:
                    below = VideoLegend(predictor.classes, predictor.palette, *frame.shape[:2]) if with_legend else None
                    writer = _Writer(target, reader.rate, predictor.palette, opacity, below)
                else:
                    writing.result()
                writing = pool.submit(writer.add, frame, found.classes, steps)
                bar.update(steps)
            if writing is not None:
                writing.result()
        if writer is None:
            raise ValueError('it is a video without a frame that can be read')
        writer.finish()
    except BaseException as error:
        bar.close()
        kept = _keep(writer)
        if not kept:
            raise
        of = f' of about {reader.count}' if reader.count else ''
        kept = f'{target} has the first {kept}{of} frames'
        if not isinstance(error, Exception) or isinstance(error, Stopped):
            tqdm.write(kept, file=sys.stderr)
            raise
        if isinstance(error, OSError):
            raise OSError(error.errno, f'{error.strerror or error}; {kept}', error.filename) from error
        raise ValueError(f'{str(error) or type(error).__name__}; {kept}') from error
    finally:
        bar.close()
        reader.release()
    if reader.count and max(reader.frames, writer.frames) < 0.98 * reader.count - 2:
        return (
            f'it says that it has {reader.count} frames, {reader.frames} could be read: it may be cut off or damaged; '
            f'{target} has those'
        )
    return None


def _keep(writer: '_Writer | None') -> int:
    """Complete what was written before an error, as far as that goes; the number of frames that are there now."""
    if writer is None or not writer.frames:
        return 0
    try:
        writer.finish()
    except OSError:
        return 0
    return writer.frames


class _Reader:
    """The frames of a video, turned as its metadata say, in one size, with the time that each takes."""

    def __init__(self, path: Path):
        with path.open('rb') as file:
            if not file.read(1):
                raise ValueError('it is empty (0 bytes)')
        with _quiet():
            self._capture = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG)  # 'a:b.mp4' would be a protocol
        if not self._capture.isOpened():
            raise ValueError(
                'it is no video that OpenCV can read, or cut off before the end that says where frames are'
            )
        rate, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        known = 0 < rate <= _HIGHEST_RATE
        self.rate = rate if known else _USUAL_RATE
        self.count = int(count) if known and 0 < count < 2**31 else None  # often the length times the rate
        self.frames = 0
        self._shape: tuple[int, int] | None = None
        self._last = self._time = 0.0
        self._steps = 0

    def read(self) -> tuple[np.ndarray, int] | None:
        """A frame (H, W, 3), BGR, and how many frames of a constant rate have passed since the last one."""
        for _ in range(_TRIES):
            there, frame = self._capture.read()
            if there:
                break
        else:
            return None
        self._shape = self._shape or frame.shape[:2]
        if frame.shape[:2] != self._shape:
            frame = cv2.resize(frame, self._shape[::-1], interpolation=cv2.INTER_AREA)
        now = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        passed, self._last = now - self._last, now
        left = self.count / self.rate - self._time if self.count else 0
        if not 0 < passed <= max(_LONGEST_GAP, left) or not self.frames:  # no time, or one that cannot be
            passed = 1 / self.rate
        self.frames += 1
        self._time += passed
        before, self._steps = self._steps, int(self._time * self.rate + 0.501)  # half a step is always one
        return frame, self._steps - before

    def release(self) -> None:
        self._capture.release()


def _ahead(reader: _Reader, predictor: Predictor) -> Iterator[tuple[np.ndarray, int, dict | None]]:
    """Frames that have a time of their own, with their steps and what the pipeline made of them, one ahead."""

    def load() -> tuple[np.ndarray, int, dict | None] | None:
        while (one := reader.read()) is not None:
            frame, steps = one
            if steps:
                return frame, steps, predictor.prepare(frame) if frame.size <= 3 * PREPARED_AHEAD else None
        return None

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(load)
        while (current := following.result()) is not None:
            following = pool.submit(load)
            yield current


class _Writer:
    """Paints frames and writes them under a temporary name."""

    def __init__(
        self, path: Path, rate: float, palette: Sequence[Sequence[int]], opacity: float, below: VideoLegend | None
    ):
        self.frames = 0
        self._path, self._part = path, path.with_name(f'.{path.stem}.part{path.suffix}')
        self._rate, self._palette, self._opacity, self._below = rate, palette, opacity, below
        self._writer: cv2.VideoWriter | None = None
        self._last: np.ndarray | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, frame: np.ndarray, classes: np.ndarray, steps: int) -> None:
        """Write a frame, after the last one again where more than one step has passed since."""
        picture = overlay(frame, classes, self._palette, self._opacity)
        if self._below is not None:
            strip = self._below.strip(classes)
            beside = strip.shape[1] - picture.shape[1]
            picture = cv2.copyMakeBorder(picture, 0, 0, 0, beside, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            picture = np.concatenate((picture, strip))
        height, width = picture.shape[:2]
        picture = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        if self._writer is None:
            self._writer = self._open(*picture.shape[:2])
            self._last = picture
        for number in range(steps):
            if self.frames % 32 == 0 and shutil.disk_usage(self._path.parent).free < _SPARE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._writer.write(picture if number == steps - 1 else self._last)
            self.frames += 1
        self._last = picture

    def _open(self, height: int, width: int) -> cv2.VideoWriter:
        code = cv2.VideoWriter_fourcc(*VIDEO_FORMATS[self._path.suffix[1:]])
        with self._part.open('wb'):  # the system says why it cannot be written, OpenCV would not
            pass
        with _quiet():
            name = os.path.abspath(self._part)
            writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, code, self._rate, (width, height))
        if not writer.isOpened():
            self._part.unlink(missing_ok=True)
            raise ValueError(f'OpenCV cannot write {self._path.suffix[1:]} of {width} x {height} pixels')
        return writer

    def finish(self) -> None:
        """Complete the file and put it in its place.

        Raises:
            OSError: not all of it arrived on the disk; nothing of it stays.
        """
        if self._writer is None:
            return
        self._writer.release()
        try:
            with _quiet():
                written = cv2.VideoCapture(os.path.abspath(self._part), cv2.CAP_FFMPEG)
            there = written.get(cv2.CAP_PROP_FRAME_COUNT) if written.isOpened() else 0
            written.release()
            if there < 0.98 * self.frames - 2:  # OpenCV does not report errors of writing
                self.frames = 0
                reason = 'not all of the video could be written: is the disk full?'
                raise OSError(errno.EIO, reason, str(self._path))
            os.replace(self._part, self._path)
        finally:
            self._writer = None
            self._part.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what OpenCV says on stderr when it opens a file, which is not for users; some of it is no log message."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
        cv2.utils.logging.setLogLevel(level)
