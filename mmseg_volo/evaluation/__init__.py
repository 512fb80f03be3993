"""How well a model predicts: the metric, and the record of each evaluation that reports are made of."""

from .metric import ConfusionIoUMetric, iou_of
from .prediction_files import PredictionFilesHook
from .record import FOLDER
from .record_hook import EvaluationRecordHook

__all__ = ['FOLDER', 'ConfusionIoUMetric', 'EvaluationRecordHook', 'PredictionFilesHook', 'iou_of']
