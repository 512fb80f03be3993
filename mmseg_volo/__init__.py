"""Semantic segmentation with VOLO on MMSegmentation: importing this package registers what it adds to mmseg."""

from .checkpoint import CheckpointError
from .data.datasets import CamVidDataset
from .data.street_scenes import StreetSceneDataset
from .heads import LeanUPerHead
from .losses import BandedLoss, LeanFCNHead
from .necks import VOLOPyramid
from .runner import BFloat16OptimWrapper, VOLORunner
from .segmentors import StreamingEncoderDecoder, StreamingTTAModel
from .version import __version__
from .volo import ARCHS, VOLO

__all__ = [
    'ARCHS',
    'VOLO',
    'BFloat16OptimWrapper',
    'BandedLoss',
    'CamVidDataset',
    'CheckpointError',
    'LeanFCNHead',
    'LeanUPerHead',
    'StreamingEncoderDecoder',
    'StreamingTTAModel',
    'StreetSceneDataset',
    'VOLOPyramid',
    'VOLORunner',
    '__version__',
]
