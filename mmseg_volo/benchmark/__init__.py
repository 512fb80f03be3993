"""Measurements for ``tools/benchmark.py``: time, peak memory, and whether results change.

The peer, "stock", is what mmseg users have without this package: timm's VOLO in mmseg's EncoderDecoder, UPerHead and
SegTTAModel. "compiled" is the same through ``torch.compile``, where a compiler is there (a CPU needs one for C++). All
sides get the same random weights and the same input. Times are taken in one process, where the sides take turns; memory
on a GPU there too, on a CPU in a process for each side. MB are 10^6 bytes.
"""

from .backbone import BackboneCase, measure_backbone
from .cases import SIDES, Case
from .inference import measure_inference
from .measuring import environment
from .models import NETWORKS, RUNS, ModelCase, measure_models
from .op import IMPLEMENTATIONS, MODES, OpCase, measure_op
from .peer import build, copy_weights, ready
from .pictures import draw, prepare, view_pixels
from .precision import OPTIONS, measure_precision
from .prediction import measure_memory
from .reporting import print_header
from .saving import SaveCase, measure_saving
from .scaling import measure_scaling, sizes_of
from .suite import Plan, run_suite
from .suite_parts import PARTS, find_camvid
from .training import TrainCase, measure_train

__all__ = [
    'IMPLEMENTATIONS',
    'MODES',
    'NETWORKS',
    'OPTIONS',
    'PARTS',
    'RUNS',
    'SIDES',
    'BackboneCase',
    'Case',
    'ModelCase',
    'OpCase',
    'Plan',
    'SaveCase',
    'TrainCase',
    'build',
    'copy_weights',
    'draw',
    'environment',
    'find_camvid',
    'measure_backbone',
    'measure_inference',
    'measure_memory',
    'measure_models',
    'measure_op',
    'measure_precision',
    'measure_saving',
    'measure_scaling',
    'measure_train',
    'prepare',
    'print_header',
    'ready',
    'run_suite',
    'sizes_of',
    'view_pixels',
]
