"""Videos for tests, drawn and written with OpenCV, and what cameras do to them."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

CODES = {'.mp4': 'mp4v', '.mov': 'mp4v', '.avi': 'MJPG', '.webm': 'VP80', '.mkv': 'mp4v'}


def frame(number: int, height: int, width: int) -> np.ndarray:
    """A smooth scene (height, width, 3) uint8 with a white bar as long as the frame's number says."""
    rows, columns = np.mgrid[:height, :width]
    picture = np.stack([rows * 200 // height, columns * 200 // width, (rows + columns + 3 * number) % 200], axis=-1)
    picture[4:12, : 4 * (number % 16) + 4] = 255
    return picture.astype(np.uint8)


def draw_video(path: Path, frames: int = 12, height: int = 64, width: int = 96, rate: float = 25.0) -> Path:
    """A video of :func:`frame`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, [frame(number, height, width) for number in range(frames)], rate)
    return path


def write(path: Path, frames: Sequence[np.ndarray], rate: float) -> None:
    code = cv2.VideoWriter_fourcc(*CODES[path.suffix])
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, rate, frames[0].shape[1::-1])
    assert writer.isOpened()
    for one in frames:
        writer.write(one)
    writer.release()


def frames_of(path: Path) -> tuple[list[np.ndarray], float]:
    """Every frame of a video that plays to its end, and its rate."""
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    assert capture.isOpened(), path
    count, rate = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (one := capture.read())[0]:
        frames.append(one[1])
    assert len(frames) == count
    return frames, rate


def turn(path: Path) -> None:
    """Say in an .mp4's header that the camera was held upright: a quarter turn clockwise for whoever plays it."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b'tkhd') + 4 + 40
    entries = [0, 2**16, 0, -(2**16), 0, 0, 0, 0, 2**30]
    data[matrix : matrix + 36] = b''.join(entry.to_bytes(4, 'big', signed=True) for entry in entries)
    path.write_bytes(data)


def vary_rate(path: Path) -> None:
    """Let the first two thirds of an .mp4's frames take half as long, the others twice: as long in all."""
    data = bytearray(path.read_bytes())
    at = data.index(b'stts')
    count, delta = (int.from_bytes(data[i : i + 4], 'big') for i in (at + 12, at + 16))
    assert int.from_bytes(data[at + 8 : at + 12], 'big') == 1 and count % 3 == 0 and delta % 2 == 0
    table = (2, count * 2 // 3, delta // 2, count // 3, delta * 2)
    data[at + 8 : at + 20] = b''.join(number.to_bytes(4, 'big') for number in table)
    assert data.index(b'moov') > data.index(b'mdat')  # what lies behind it moves, and nothing points there
    for name in (b'moov', b'trak', b'mdia', b'minf', b'stbl', b'stts'):
        size = data.index(name) - 4
        data[size : size + 4] = (int.from_bytes(data[size : size + 4], 'big') + 8).to_bytes(4, 'big')
    path.write_bytes(data)
