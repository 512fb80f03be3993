"""A pytest plugin that puts this package's classes in the place of mmengine's and mmseg's, for their own tests.

``tests/test_published.py`` loads it with ``-p published_swap`` in a process of its own, which it changes for good.
"""

import functools
import sys

import mmengine.registry
import mmengine.testing  # its test cases name the runner
import mmseg.registry
from mmengine.config import ConfigDict
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseTTAModel
from mmengine.registry import Registry
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.models import EncoderDecoder, SegTTAModel
from mmseg.models.decode_heads import FCNHead, UPerHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead

import mmseg_volo


class BandedHead(mmseg_volo.BandedLoss, BaseDecodeHead):
    """Any decode head with the loss of this package."""


class Segmentor(mmseg_volo.StreamingEncoderDecoder):
    """Predictions have ``seg_logits``, which mmseg's tests read."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.test_cfg = ConfigDict(self.test_cfg or {}, return_logits=True)


SWAPS = {
    CheckpointHook: mmseg_volo.AtomicCheckpointHook,
    Runner: mmseg_volo.VOLORunner,
    InfiniteSampler: mmseg_volo.ResumableSampler,
    IterBasedTrainLoop: mmseg_volo.ResumableTrainLoop,
    BaseTTAModel: mmseg_volo.StreamingTTAModel,
    SegTTAModel: mmseg_volo.StreamingTTAModel,
    EncoderDecoder: Segmentor,
    BaseDecodeHead: BandedHead,
    FCNHead: mmseg_volo.LeanFCNHead,
    UPerHead: mmseg_volo.LeanUPerHead,
}
BUILT = set()  # names of the classes above of which the tests made an object


def record(kind: type) -> None:
    """Note in BUILT when an object of this class, or of a subclass, is made."""
    initialise = kind.__init__

    @functools.wraps(initialise)
    def init(self, *args, **kwargs):
        BUILT.add(kind.__name__)
        initialise(self, *args, **kwargs)

    kind.__init__ = init


def pytest_terminal_summary(terminalreporter) -> None:
    """Print which classes the tests reached."""
    terminalreporter.write_line(f'built: {" ".join(sorted(BUILT))}')


for package in (mmengine.registry, mmseg.registry):
    for registry in [value for value in vars(package).values() if isinstance(value, Registry)]:
        for name, theirs in list(registry.module_dict.items()):
            if theirs in SWAPS:
                registry.register_module(name, force=True, module=SWAPS[theirs])
for path, module in list(sys.modules.items()):
    if path.split('.')[0] in ('mmengine', 'mmseg'):
        for name, theirs in list(vars(module).items()):
            if isinstance(theirs, type) and theirs in SWAPS:
                setattr(module, name, SWAPS[theirs])
for ours in set(SWAPS.values()):
    record(ours)
