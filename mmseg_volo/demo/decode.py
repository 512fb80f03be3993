"""Decode an image to see whether that ends: python decode.py FILE MEGAPIXELS. Imports little, to start fast."""

import sys
from contextlib import suppress

import cv2
import numpy as np
from PIL import Image

_MEMORY = 8 * 2**30  # bytes of addresses


def main(path: str, megapixels: float) -> None:
    with suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    with suppress(Exception):  # PIL's parsers raise nearly anything on broken files
        with Image.open(path) as image:
            fits = image.width * image.height <= megapixels * 1e6
            getattr(image, 'n_frames', 1)  # of some formats, the whole file is read for it
        if fits:
            cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)


if __name__ == '__main__':
    main(sys.argv[1], float(sys.argv[2]))
