"""Settings of OpenCV."""

import contextlib
from collections.abc import Iterator

import cv2


@contextlib.contextmanager
def quiet_opencv() -> Iterator[None]:
    """Keep OpenCV from logging, for example a line on stderr for each tag of a GeoTIFF that it does not know.

    Files that cannot be read are reported with a reason of their own. Importing the package changes nothing.
    """
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
