"""Semantic segmentation with VOLO on MMSegmentation: importing this package registers what it adds to mmseg.

:mod:`mmseg_volo.ops` can be used without MMSegmentation; then nothing else is here.
"""

from importlib.util import find_spec

from .version import __version__

_MISSING = [name for name in ('mmengine', 'mmcv', 'mmseg') if find_spec(name) is None]
if not _MISSING:
    from .datasets.bands import LoadBands
    from .datasets.camvid import CamVidDataset
    from .datasets.loading import LoadCheckedAnnotations, LoadCheckedImage
    from .datasets.street_scenes import StreetSceneDataset
    from .engine.averaging import VOLOEMAHook
    from .engine.checkpoint_hook import AtomicCheckpointHook
    from .engine.guards import LabelGuardHook, NonFiniteGuardHook
    from .engine.loop import ResumableSampler, ResumableTrainLoop
    from .engine.optim import BFloat16OptimWrapper, VOLOLayerDecayConstructor
    from .engine.runner import VOLORunner
    from .engine.sharding import VOLOFullyShardedDataParallel
    from .errors import CheckpointError, ConfigError, DataError
    from .evaluation import ConfusionIoUMetric, EvaluationRecordHook
    from .inference.model import init_model
    from .models.heads import LeanUPerHead
    from .models.losses import BandedLoss, LeanFCNHead
    from .models.necks import VOLOPyramid
    from .models.preprocessor import BandsDataPreProcessor
    from .models.segmentors import StreamingEncoderDecoder, StreamingTTAModel
    from .models.volo import ARCHS, VOLO

__all__ = [
    'ARCHS',
    'VOLO',
    'AtomicCheckpointHook',
    'BFloat16OptimWrapper',
    'BandedLoss',
    'BandsDataPreProcessor',
    'CamVidDataset',
    'CheckpointError',
    'ConfigError',
    'ConfusionIoUMetric',
    'DataError',
    'EvaluationRecordHook',
    'LabelGuardHook',
    'LeanFCNHead',
    'LeanUPerHead',
    'LoadBands',
    'LoadCheckedAnnotations',
    'LoadCheckedImage',
    'NonFiniteGuardHook',
    'ResumableSampler',
    'ResumableTrainLoop',
    'StreamingEncoderDecoder',
    'StreamingTTAModel',
    'StreetSceneDataset',
    'VOLOEMAHook',
    'VOLOFullyShardedDataParallel',
    'VOLOLayerDecayConstructor',
    'VOLOPyramid',
    'VOLORunner',
    '__version__',
    'from_pretrained',
    'init_model',
    'push_to_hub',
]


def __getattr__(name: str) -> object:
    if name in __all__ and _MISSING:
        raise ImportError(
            f'mmseg_volo.{name} needs {", ".join(_MISSING)}, which are not installed (pip install mmseg_volo installs '
            'them); only mmseg_volo.ops works without them'
        )
    if name in ('from_pretrained', 'push_to_hub'):  # imported on first use, with the model card and the hub's client
        from .publish import hub

        return getattr(hub, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
