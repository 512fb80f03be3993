"""Semantic segmentation with VOLO on MMSegmentation: importing this package registers what it adds to mmseg."""

from .apis import init_model
from .data.check import DataError
from .data.datasets import CamVidDataset
from .data.guard import LabelGuardHook
from .data.loading import LoadCheckedAnnotations, LoadCheckedImage
from .data.street_scenes import StreetSceneDataset
from .errors import CheckpointError, ConfigError
from .evaluation import ConfusionIoUMetric, EvaluationRecordHook
from .heads import LeanUPerHead
from .hooks import AtomicCheckpointHook, NonFiniteGuardHook
from .losses import BandedLoss, LeanFCNHead
from .necks import VOLOPyramid
from .optim import VOLOLayerDecayConstructor
from .resumable import ResumableSampler, ResumableTrainLoop
from .runner import BFloat16OptimWrapper, VOLORunner
from .segmentors import StreamingEncoderDecoder, StreamingTTAModel
from .sharding import VOLOFullyShardedDataParallel
from .version import __version__
from .volo import ARCHS, VOLO

__all__ = [
    'ARCHS',
    'VOLO',
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'BandedLoss',
    'CamVidDataset',
    'CheckpointError',
    'ConfigError',
    'ConfusionIoUMetric',
    'DataError',
    'EvaluationRecordHook',
    'LabelGuardHook',
    'LeanFCNHead',
    'LeanUPerHead',
    'LoadCheckedAnnotations',
    'LoadCheckedImage',
    'NonFiniteGuardHook',
    'ResumableSampler',
    'ResumableTrainLoop',
    'StreamingEncoderDecoder',
    'StreamingTTAModel',
    'StreetSceneDataset',
    'VOLOFullyShardedDataParallel',
    'VOLOLayerDecayConstructor',
    'VOLOPyramid',
    'VOLORunner',
    '__version__',
    'init_model',
]
