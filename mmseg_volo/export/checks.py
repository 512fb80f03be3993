"""Whether an exported file is sound, and does what the model does."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmseg.models import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample

from ..datasets.street_drawing import draw_scene
from ..errors import ExportError
from ..inference.files import find_images
from ..inference.images import read_image
from ..models.onnx import STEP, Run
from .formats import OPSET
from .tensorrt import TENSORRT, why_not

LARGEST_DIFFERENCE = 1e-3  # of float32 logits
LEAST_EQUAL = {'fp32': 0.999, 'fp16': 0.99}  # share of the pixels with the same class


class Parity(NamedTuple):
    """A file against the model: greatest difference of logits, share of pixels with the same class."""

    size: tuple[int, int]
    batch: int
    difference: float
    equal: float


def check_onnx(path: Path) -> dict[str, int]:
    """Hold an ONNX file against ONNX's definitions, infer its shapes, and look its operators up in TensorRT's table.

    Returns:
        How often each operator occurs.

    Raises:
        ExportError: it is not sound, is of another opset, or TensorRT would not read it.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)  # full: with the inferred shapes
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f'onnx.checker refuses the file: {error}') from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if opsets != {'': OPSET}:
        raise ExportError(f'the file needs the operator sets {opsets}, expected ONNX {OPSET} alone')
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    refused = sorted({reason for reason in map(why_not, nodes) if reason})
    if refused:
        raise ExportError(f'TensorRT {TENSORRT} would not read the file: {"; ".join(refused)}')
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def sample_pictures(config: Config, sources: Sequence[str], count: int = 4) -> tuple[list[np.ndarray], str]:
    """Pictures (H, W, 3), BGR, uint8, to compare on, and where they are from.

    Those given, else the first of the config's test data, else, where that is not there, drawn street scenes.
    """
    if sources:
        paths = list(find_images(sources))[:count]
    else:
        try:
            dataset = DATASETS.build(dict(config.test_dataloader.dataset, pipeline=[]))
            places = np.linspace(0, len(dataset) - 1, count).astype(int)
            paths = [Path(dataset.get_data_info(int(i))['img_path']) for i in places]
        except (OSError, ValueError, IndexError):
            drawn = [draw_scene(seed, (512, 1024))[0] for seed in range(count)]
            return drawn, 'drawn street scenes, since the test data is not here'
    return [read_image(path) for path in paths], f'pictures from {paths[0].parent}'


def sizes_to_check(size: tuple[int, int], dynamic: bool) -> list[tuple[int, int]]:
    """The file's size; of a dynamic one also others, among them one that is no multiple of 32 and the least."""
    if not dynamic:
        return [size]
    height, width = size
    return [size, (height + 2 * STEP, max(width - STEP, 2 * STEP)), (width, height), (2 * STEP, 2 * STEP)]


@torch.no_grad()
def compare(
    run: Run, about: dict, segmentor: EncoderDecoder, pictures: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[Parity]:
    """Run the file and the model on pictures.

    Args:
        run: of :func:`~mmseg_volo.models.onnx.open_onnx` or ``open_pt2``.
        about: what the file says of itself.
        segmentor: the model in PyTorch, float32.
        pictures: resized to each of ``sizes``; run one by one, and all together at the first size.
    """
    found = []
    for i, size in enumerate(sizes):
        resized = np.stack([cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA) for picture in pictures])
        batches = [resized[n : n + 1] for n in range(len(resized))]
        for batch in [*batches, resized] if i == 0 else batches:
            found.append(_compare(run, about, segmentor, batch))
    return found


def _compare(run: Run, about: dict, segmentor: EncoderDecoder, pictures: np.ndarray) -> Parity:
    images, size = torch.from_numpy(pictures).permute(0, 3, 1, 2), pictures.shape[1:3]
    data = segmentor.data_preprocessor(dict(inputs=list(images), data_samples=[SegDataSample() for _ in images]))
    inputs = data['inputs'][:, :, : size[0], : size[1]]  # the preprocessor may pad
    coarse = segmentor.decode_head(segmentor.extract_feat(inputs))
    logits = resize(coarse, size, mode='bilinear', align_corners=bool(segmentor.align_corners))
    main, own = run(pictures if about['preprocess'] else inputs.numpy())
    if logits.shape[1] == 1:
        threshold = segmentor.decode_head.threshold
        classes = (logits[:, 0].sigmoid() > threshold).int().numpy()
    else:
        threshold, classes = None, logits.argmax(1).numpy()
    differences = [np.abs(own - coarse.numpy()).max()]
    if about['output'] == 'logits':
        differences.append(np.abs(main - logits.numpy()).max())
        given = main.argmax(1) if threshold is None else (1 / (1 + np.exp(-main[:, 0])) > threshold)
    else:
        given = main
    return Parity(size, len(pictures), float(max(differences)), float((given == classes).mean()))


def judge(found: Sequence[Parity], precision: str) -> None:
    """Print what was compared.

    Raises:
        ExportError: logits differ by more than :data:`LARGEST_DIFFERENCE` (float32), fewer pixels than
            :data:`LEAST_EQUAL` have the same class, or something is not finite.
    """
    worst, least = max(p.difference for p in found), min(p.equal for p in found)
    sizes = ', '.join(dict.fromkeys(f'{h} x {w}' for h, w in (p.size for p in found)))
    batches = ' and '.join(str(n) for n in sorted({p.batch for p in found}))
    line = (
        f'{sizes}; batches of {batches}: logits differ by {worst:.1e} at most, {least:.4%} or more of the pixels agree'
    )
    limit = LARGEST_DIFFERENCE if precision == 'fp32' else np.inf
    if not (worst <= limit and least >= LEAST_EQUAL[precision]):
        allowed = f'{limit:.0e} and {LEAST_EQUAL[precision]:.1%}'
        raise ExportError(
            f'the file does not do what the model does ({line}; allowed: {allowed}). '
            + ('Export it with --precision fp32.' if precision == 'fp16' else 'Please report it with the config.')
        )
    print_log(f'against PyTorch, {line}', logger='current')
