"""Predict images, files, folders and videos with a trained model."""

from .images import as_bgr, read_image
from .predictor import Prediction, Predictor

__all__ = ['Prediction', 'Predictor', 'as_bgr', 'read_image']
