"""Check that an exported file is valid and gives the same results as the model."""

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

from ..errors import ExportError
from ..inference.images import read_image
from ..inference.sources import find_images
from ..models.onnx import STEP, Run
from ..utils.unwrap import bare_dataset
from .formats import OPSET
from .tensorrt import TENSORRT, why_not

LARGEST_DIFFERENCE = 1e-3  # of float32 logits
LEAST_EQUAL = {'fp32': 0.999, 'fp16': 0.99}  # share of the pixels with the same class
THE_FILE = 'the file'


class Parity(NamedTuple):
    """One comparison of file and model: greatest difference of the logits, share of pixels with the same class."""

    size: tuple[int, int]
    batch: int
    difference: float
    equal: float


def check_onnx(path: Path, tensorrt: bool = True) -> dict[str, int]:
    """Validate an ONNX file, infer its shapes, and look up its operators in TensorRT's table.

    Args:
        path: the file.
        tensorrt: whether TensorRT should be able to read it.

    Returns:
        How often each operator occurs.

    Raises:
        ExportError: the file is not valid, needs another opset, or TensorRT could not read it.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)  # infers the shapes too
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f'onnx.checker refuses the file: {error}') from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {opset.domain: opset.version for opset in model.opset_import}
    if opsets != {'': OPSET}:
        raise ExportError(f'the file needs the operator sets {opsets}, expected ONNX {OPSET} alone')
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    refused = sorted({reason for reason in map(why_not, nodes) if reason}) if tensorrt else []
    if refused:
        raise ExportError(f'TensorRT {TENSORRT} would not read the file: {"; ".join(refused)}')
    return dict(sorted(Counter(node.op_type for node in nodes).items()))


def sample_images(config: Config, sources: Sequence[str], count: int = 4) -> tuple[list[np.ndarray], str]:
    """Return images (H, W, 3), BGR, uint8, for the comparison, and a text that says where they come from.

    They are the given images, else a sample of the config's test data, else, where that data is not there, random ones.
    Random images are enough: file and model must agree on every input, and the comparison needs no labels. They even
    make a harder test, because a model is less certain on them, so that an error of the logits changes more classes.
    """
    if sources:
        paths = list(find_images(sources))[:count]
    else:
        try:
            dataset = DATASETS.build(
                dict(bare_dataset((config.get('test_dataloader') or {}).get('dataset')), pipeline=[])
            )
            indices = np.linspace(0, len(dataset) - 1, count).astype(int)
            paths = [Path(dataset.get_data_info(int(i))['img_path']) for i in indices]
        except (OSError, ValueError, IndexError, KeyError):  # KeyError: without a type
            rng = np.random.default_rng(0)
            # From large smooth patches (4 x 8 of them in the first image) to small ones.
            patches = [rng.integers(0, 256, (4 << i, 8 << i, 3), np.uint8) for i in range(count)]
            images = [cv2.resize(patch, (1024, 512), interpolation=cv2.INTER_CUBIC) for patch in patches]
            return images, 'random images, because the test data is not here'
    return [read_image(path) for path in paths], f'images from {paths[0].parent}'


def sizes_to_check(size: tuple[int, int], dynamic: bool) -> list[tuple[int, int]]:
    """Return the file's size; for a dynamic one also the least size and one that is no multiple of 32."""
    if not dynamic:
        return [size]
    height, width = size
    return [size, (height + 2 * STEP, max(width - STEP, 2 * STEP)), (width, height), (2 * STEP, 2 * STEP)]


@torch.no_grad()
def compare(
    run: Run, about: dict, segmentor: EncoderDecoder, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
) -> list[Parity]:
    """Run the file and the model on images.

    Args:
        run: the file's function, from :func:`~mmseg_volo.models.onnx.open_onnx` or ``open_pt2``.
        about: the file's metadata.
        segmentor: the model in PyTorch, float32.
        images: (H, W, 3), BGR, uint8. They are resized to each of ``sizes`` and run one by one; at the first size they
            also run as one batch.
        sizes: (height, width) in pixels.
    """
    found = []
    for i, size in enumerate(sizes):
        resized = np.stack([cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA) for image in images])
        batches = [resized[n : n + 1] for n in range(len(resized))]
        for batch in [*batches, resized] if i == 0 else batches:
            found.append(_compare(run, about, segmentor, batch))
    return found


def _compare(run: Run, about: dict, segmentor: EncoderDecoder, images: np.ndarray) -> Parity:
    inputs, size = list(torch.from_numpy(images).permute(0, 3, 1, 2)), images.shape[1:3]
    data = segmentor.data_preprocessor(dict(inputs=inputs, data_samples=[SegDataSample() for _ in inputs]))
    inputs = data['inputs'][:, :, : size[0], : size[1]]  # the preprocessor may pad
    coarse = segmentor.decode_head(segmentor.extract_feat(inputs))
    logits = resize(coarse, size, mode='bilinear', align_corners=bool(segmentor.align_corners))
    main, own = run(images if about['preprocess'] else inputs.numpy())
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
    return Parity(size, len(images), float(max(differences)), float((given == classes).mean()))


def judge(found: Sequence[Parity], precision: str, what: str = THE_FILE) -> None:
    """Print the result of the comparison of ``what``, the file or a TensorRT engine of it, with the model.

    Raises:
        ExportError: logits differ by more than :data:`LARGEST_DIFFERENCE` (float32), fewer pixels than
            :data:`LEAST_EQUAL` have the same class, or a value is not finite.
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
        halves = precision == 'fp16' and what == THE_FILE
        raise ExportError(
            f'{what} and the model give different results ({line}; allowed: {allowed}). '
            + ('Export it with --precision fp32.' if halves else 'Please report it with the config.')
        )
    print_log(f'{what} compared with PyTorch: {line}', logger='current')
