"""Prediction with a trained model: images, files and folders, videos."""

from .images import as_bgr, read_image
from .predictor import Prediction, Predictor

__all__ = ['Prediction', 'Predictor', 'as_bgr', 'read_image']
