"""Measurements for ``tools/benchmark.py``: time, peak memory, and whether results change.

The peer, "stock", is what mmseg users have without this package: timm's VOLO in mmseg's EncoderDecoder, UPerHead and
SegTTAModel. "compiled" is the same through ``torch.compile``, if there is a compiler (a CPU needs one for C++). All
sides get the same random weights and the same input. Times are taken in one process, where the sides take turns; memory
on a GPU there too, on a CPU in a process for each side. MB are 10^6 bytes.
"""

from .backbone import BackboneCase
from .comparison import COMPILED, SIDES, Settings, measure
from .inference import InferenceCase, ScalingCase, sizes_of
from .machine import describe, environment
from .models import NETWORKS, RUNS, ModelsCase
from .op import IMPLEMENTATIONS, MODES, OpCase
from .precision import FILE_RUNTIMES, OPTIONS, PrecisionCase
from .saving import SaveCase
from .training import TrainCase

__all__ = [
    'COMPILED',
    'FILE_RUNTIMES',
    'IMPLEMENTATIONS',
    'MODES',
    'NETWORKS',
    'OPTIONS',
    'RUNS',
    'SIDES',
    'BackboneCase',
    'InferenceCase',
    'ModelsCase',
    'OpCase',
    'PrecisionCase',
    'SaveCase',
    'ScalingCase',
    'Settings',
    'TrainCase',
    'describe',
    'environment',
    'measure',
    'sizes_of',
]
