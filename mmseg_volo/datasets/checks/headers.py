"""Read an image file's size and EXIF orientation, and check that the file is complete, without decoding it."""

import io
import zlib
from typing import NamedTuple

from PIL import Image, TiffImagePlugin

_PNG, _JPEG = b'\x89PNG\r\n\x1a\n', b'\xff\xd8'
_TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # the last two: BigTIFF
_ORIENTATION = 0x0112
_JPEG_SIZES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers
_JPEG_BARE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
_MOST_PARTS = 10_000  # chunks or segments besides the pixels; more of them only keep a decoder busy
_TOO_MANY = f'it has more than {_MOST_PARTS} parts besides the pixels'
_NO_SIZE = 'it is damaged (its header gives no size)'
_CUT_OFF = 'it is cut off'


class Header(NamedTuple):
    """What the header of an image file says.

    Attributes:
        format: 'png', 'jpeg', 'tiff' or 'other'.
        shape: stored (height, width), or None if unknown.
        orientation: EXIF orientation, 1 if there is none; not read from TIFF.
        bits: bits of one value; not read from other formats.
        bands: number of bands; read from TIFF only.
        scans: number of scans of a JPEG, 1 for other formats. A decoder goes through the whole image in each.
    """

    format: str
    shape: tuple[int, int] | None = None
    orientation: int = 1
    bits: int = 8
    bands: int | None = None
    scans: int = 1


def read_header(data: bytes) -> Header:
    """Read an image file's header, and check that the file is complete.

    A PNG must have all critical chunks with valid checksums, and a JPEG its end marker. Other formats must only not be
    empty; to check them, decode them.

    Raises:
        ValueError: the file is empty, cut off or damaged. The message is a clause: 'it is cut off'.
    """
    if not data:
        raise ValueError('it is empty (0 bytes)')
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(_JPEG):
        return _jpeg(data)
    if data.startswith(_TIFF):
        return _tiff(data)
    return Header('other')


def _png(data: bytes) -> Header:
    view, at, shape, orientation, bits, parts = memoryview(data), len(_PNG), None, 1, 8, 0
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4], 'big')
        if end > len(data):
            break
        parts += kind != b'IDAT'
        if parts > _MOST_PARTS:
            raise ValueError(_TOO_MANY)
        # A lower-case first letter marks an optional chunk, whose checksum decoders ignore.
        if not kind[0] & 0x20 and zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], 'big'):
            raise ValueError('it is damaged (a checksum in it differs)')
        if kind == b'IHDR':
            shape = int.from_bytes(data[at + 12 : at + 16], 'big'), int.from_bytes(data[at + 8 : at + 12], 'big')
            bits = data[at + 16]
        elif kind == b'eXIf':
            orientation = _orientation(data[at + 8 : end - 4])
        elif kind == b'IEND':
            if shape is None or 0 in shape:
                raise ValueError(_NO_SIZE)
            return Header('png', shape, orientation, bits)
        at = end
    raise ValueError(_CUT_OFF)


def _jpeg(data: bytes) -> Header:
    at, shape, orientation, parts = len(_JPEG), None, 1, 0
    while True:
        at = data.find(b'\xff', at)
        if at < 0 or at + 4 > len(data):
            raise ValueError(_CUT_OFF)
        marker = data[at + 1]
        if marker in (0x00, 0xFF):
            at += 1
        elif marker in _JPEG_BARE:
            at += 2
        elif marker == 0xD9:
            raise ValueError('it is damaged (it ends before the image data)')
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
            segment = data[at + 4 : end]
            parts += 1
            if parts > _MOST_PARTS:
                raise ValueError(_TOO_MANY)
            if marker in _JPEG_SIZES:
                shape = int.from_bytes(segment[1:3], 'big'), int.from_bytes(segment[3:5], 'big')
            elif marker == 0xE1 and segment.startswith(b'Exif\0\0'):
                orientation = _orientation(segment)
            elif marker == 0xDA:
                break
            at = end
    if shape is None or 0 in shape:
        raise ValueError(_NO_SIZE)
    # In scan data, 0xFF is always followed by 0 or a restart marker, so only the end marker matches.
    end = data.find(b'\xff\xd9', at)
    if end < 0:
        raise ValueError(_CUT_OFF)
    return Header('jpeg', shape, orientation, scans=data.count(b'\xff\xda', at, end))


def _tiff(data: bytes) -> Header:
    """Read the first directory of tags, which PIL does for every TIFF: it opens only some kinds of them as images."""
    file = io.BytesIO(data)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(16 if b'+' in data[:4] else 8))
        file.seek(tags.next)
        tags.load(file)
        shape = int(tags[TiffImagePlugin.IMAGELENGTH]), int(tags[TiffImagePlugin.IMAGEWIDTH])
        bits, bands = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,)), tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        return Header('tiff', shape, 1, max(bits), int(bands))
    except Exception:  # PIL may raise anything on broken tags; the decoder then says whether it can read the file
        return Header('other')


def _orientation(exif: bytes) -> int:
    try:
        tags = Image.Exif()
        tags.load(exif)
        return int(tags.get(_ORIENTATION, 1))
    except Exception:  # PIL may raise anything on broken tags; decoders then do not rotate the image
        return 1
