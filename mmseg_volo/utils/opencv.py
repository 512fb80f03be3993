"""Settings of OpenCV for the tools."""

import cv2


def quieten_opencv() -> None:
    """Stop OpenCV from logging, for example a line on stderr for each unknown tag of a GeoTIFF.

    The tools report files that cannot be read with a reason of their own. Importing the package changes nothing.
    """
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
