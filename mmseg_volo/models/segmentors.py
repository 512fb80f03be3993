"""mmseg's segmentor and test-time augmentation with streaming prediction (:mod:`mmseg_volo.models.streaming`)."""

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegDataPreProcessor, SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import SampleList
from torch import Tensor, nn

from ..checkpoints.compatibility import check_weights
from ..utils.devices import check_device
from .inputs import check_images
from .streaming import View, axis
from .windows import WindowNetwork

# Evaluation samples every 7th pixel in both directions: 43,000 pixels of 1024 x 2048. The step is odd, so that the
# sample has all positions between two logits, which are 4, 8 or 16 pixels apart.
SAMPLE_STEP = 7


@MODELS.register_module()
class StreamingEncoderDecoder(EncoderDecoder):
    """mmseg's :class:`EncoderDecoder` with the same weights, losses and logits, and predictions in little memory.

    Sliding windows run in batches, across images too, and a class map is computed one narrow band at a time: no tensor
    of C x H x W exists unless ``return_logits`` is set. Arguments are those of EncoderDecoder. ``test_cfg`` takes
    ``mode``, ``crop_size`` and ``stride``, and also:

    - ``window_batch``: windows per forward pass. The default is 2 windows of 1024 x 1024 pixels on a GPU and 1 of
      512 x 512 on a CPU, or as many smaller windows as have the same pixels. On a GPU it is halved when memory runs
      out.
    - ``precision``: 'fp32', 'bf16' or 'fp16' (autocast); by default the caller's autocast.
    - ``compile``: use ``torch.compile``: once for VOLO's stem and once for each kind of its blocks; on other networks
      as a whole.
    - ``cuda_graph``: replay a CUDA graph for batches of the same number and shape of windows. By default only on a GPU
      for VOLO in eval mode, without gradients, hooks and ``compile``, after the third such batch. True: for other
      networks and with ``compile`` too, after the first batch. False: never. A graph follows changes of the weights,
      but not of other attributes of modules.
    - ``channels_last``: keep the weights of convolutions in this memory format.
    - ``confidence``: predictions have ``seg_confidence`` (1, H, W), the probability of the predicted class.
    - ``return_logits``: predictions have ``seg_logits`` (C, H, W), like those of EncoderDecoder. Evaluation instead
      sets ``network.sampled``, so that predictions have ``sampled_logits``, the logits of every 7th pixel.
    - ``allow_mismatch``: accept checkpoints of other models and load the weights that fit
      (:func:`~mmseg_volo.checkpoints.compatibility.check_weights`).

    Raises:
        ValueError: an unknown precision, or a stride larger than ``crop_size``, which would leave pixels out.
        CheckpointError: on loading a checkpoint of another model.
        ConfigError: on moving to a device that does not exist.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.network = WindowNetwork(self, follows_training=True)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode, and release the memory of CUDA graphs."""
        self.network.graphs.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.network.graphs.clear()  # so that the memory of moved or converted weights is freed at once
        return super()._apply(*args, **kwargs)

    def to(self, *args, **kwargs) -> nn.Module:
        """Move or convert the model; raises ConfigError for a device that does not exist."""
        for device in (*args[:1], kwargs.get('device')):
            check_device(device)
        return super().to(*args, **kwargs)

    def cuda(self, device: int | str | torch.device | None = None) -> nn.Module:
        """Move the model to a GPU; raises ConfigError if it does not exist."""
        check_device('cuda' if device is None else device)
        return super().cuda(device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args) -> None:
        # mmseg's own entry points do not check checkpoints; the runner and init_model do.
        if not prefix:
            check_weights(self, state_dict, 'infer')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def test_step(self, data: dict | tuple | list) -> SampleList:
        """Predict a batch from the data loader, as in mmengine.

        Raises:
            ValueError: an image has a wrong number of channels, or values outside the 8-bit range.
        """
        if isinstance(data, dict):
            check_images(self, data.get('inputs', ()), data.get('data_samples'))
        return _by_size(super().test_step, data)

    val_step = test_step  # as in mmengine, with the same check

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: SampleList | None = None) -> SampleList:
        """Predict class ids for a batch of preprocessed images (N, 3, H, W).

        Returns:
            The data samples, or new ones, each with ``pred_sem_seg`` (1, h, w) of the original size, int64 (float32
            with one output channel, as in mmseg), and with ``seg_confidence`` and ``seg_logits`` if ``test_cfg`` asks
            for them.
        """
        if data_samples is None:
            data_samples = [SegDataSample() for _ in inputs]
        views = [[_view(self, sample, image)] for image, sample in zip(inputs, data_samples, strict=True)]
        for sample, result in zip(data_samples, _results(self, self.network, views), strict=True):
            sample.set_data(result)
        return data_samples

    def slide_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of preprocessed images (N, 3, H, W); overlapping windows are averaged."""
        return self._logits(inputs)

    def whole_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of preprocessed images (N, 3, H, W)."""
        return self._logits(inputs)

    def _logits(self, inputs: Tensor) -> Tensor:
        views = [[_view(self, SegDataSample(), image)] for image in inputs]
        logits = inputs.new_empty(len(inputs), self.out_channels, *inputs.shape[2:])
        with self.network.running():
            for n, along, across, tiles in self.network.stream(views):
                target = logits[n].mT if views[n][0].transposed else logits[n]
                target[:, along, across] = next(tiles).transpose(0, 1)
        return logits


@MODELS.register_module()
class StreamingTTAModel(SegTTAModel):
    """mmseg's :class:`SegTTAModel` without full-size logits of any view.

    All views of an image are merged one narrow band at a time. Windows of the same size share batches across views. The
    result is the average of probabilities, as in mmseg. With ``test_cfg.return_logits``, ``seg_logits`` (C, H, W) is
    this average; ``seg_confidence`` is as in :class:`StreamingEncoderDecoder`.

    Args:
        module: an :class:`EncoderDecoder` of this package or mmseg, or its config.
        sigmoid_twice: for heads with one output channel. mmseg's SegTTAModel applies a second sigmoid to the output of
            ``predict``, so that no value is below 0.5. True does the same; False averages the probabilities.

    Raises:
        TypeError: ``module`` is another kind of model.
    """

    def __init__(
        self, module: nn.Module | dict, data_preprocessor: nn.Module | dict | None = None, sigmoid_twice: bool = False
    ):
        super().__init__(module, data_preprocessor)
        if not isinstance(self.module, EncoderDecoder):
            raise TypeError(
                f'StreamingTTAModel needs an EncoderDecoder, got {type(self.module).__name__}; use SegTTAModel with it'
            )
        self.sigmoid_twice = sigmoid_twice
        if self.module.out_channels == 1 and sigmoid_twice and self.module.decode_head.threshold <= 0.5:
            warnings.warn(
                "as in mmseg's SegTTAModel, the sigmoid is applied twice, so every pixel is over the threshold "
                f'{self.module.decode_head.threshold}; without sigmoid_twice=True, the probabilities are averaged',
                stacklevel=2,
            )
        own = isinstance(self.module, StreamingEncoderDecoder)
        self.network = self.module.network if own else WindowNetwork(self.module)

    @torch.no_grad()
    def test_step(self, data: dict) -> SampleList:
        """Predict images from their views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list over views of lists over images, as ``TestTimeAug`` with
                ``pseudo_collate`` returns them.

        Returns:
            The data sample of each image's first view, with the merged prediction.
        """
        views: list[list[View]] = [[] for _ in data['inputs'][0]]
        for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
            check_images(self.module, inputs, samples)
            for n, view in enumerate(self._views(inputs, samples)):
                views[n].append(view)
        samples = data['data_samples'][0]
        results = _results(self.module, self.network, views, average=True, sigmoid_twice=self.sigmoid_twice)
        for sample, result in zip(samples, results, strict=True):
            sample.set_data(result)
        return samples

    def _views(self, inputs: Sequence[Tensor], samples: SampleList) -> list[View]:
        preprocessor = self.module.data_preprocessor
        if type(preprocessor) is SegDataPreProcessor:
            # It is pixel-wise: applied to windows, it leaves the view in 8 bits.
            crops = [_prepared_crops(preprocessor, image) for image in inputs]
            return [_view(self.module, sample, *crop) for sample, crop in zip(samples, crops, strict=True)]
        # One by one: it may stack a batch, which takes images of one size only.
        prepared = [
            preprocessor(dict(inputs=[image], data_samples=[sample]), False)
            for image, sample in zip(inputs, samples, strict=True)
        ]
        return [_view(self.module, one['data_samples'][0], one['inputs'][0]) for one in prepared]


def _by_size(step: Callable, data: dict | tuple | list) -> SampleList:
    """Run ``step`` for the images of each size: mmseg's data preprocessor stacks a batch, which needs one size."""
    images = data.get('inputs') if isinstance(data, dict) else None
    shapes = [tuple(image.shape) for image in images] if isinstance(images, (list, tuple)) else []
    if len(set(shapes)) < 2:
        return step(data)
    results: list[SegDataSample | None] = [None] * len(shapes)
    for shape in dict.fromkeys(shapes):
        chosen = [i for i, other in enumerate(shapes) if other == shape]
        found = step({key: [values[i] for i in chosen] if values else values for key, values in data.items()})
        for i, result in zip(chosen, found, strict=True):
            results[i] = result
    return results


def _view(
    segmentor: EncoderDecoder,
    sample: SegDataSample,
    image: Tensor | Callable,
    shape: tuple[int, int] | None = None,
    padding: Sequence[int] | None = None,
) -> View:
    """The view that a data sample describes; of a preprocessed image (3, H, W), or of a crop function and a shape."""
    if isinstance(image, Tensor):
        shape = tuple(image.shape[-2:])
        crop = lambda top, left, height, width: image[:, top : top + height, left : left + width]  # noqa: E731
    else:
        crop = image
    meta = sample.metainfo
    if padding is None:
        padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
    left, right, top, bottom = map(int, padding)
    out = tuple(map(int, meta.get('ori_shape', shape)[:2]))
    flip = meta.get('flip_direction') if meta.get('flip') else None
    if flip not in (None, 'horizontal', 'vertical'):
        raise ValueError(f"flip_direction must be 'horizontal' or 'vertical', got {flip!r}")
    window, stride = _windows(segmentor, shape)
    align = bool(segmentor.align_corners)
    rows = axis(shape[0], window[0], stride[0], out[0], top, bottom, flip == 'vertical', align)
    columns = axis(shape[1], window[1], stride[1], out[1], left, right, flip == 'horizontal', align)
    return View(crop, rows, columns)


def _windows(segmentor: EncoderDecoder, shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Size and stride of the windows in a view of this shape; one window in mode 'whole'."""
    cfg = segmentor.test_cfg
    mode = cfg.get('mode', 'whole')
    if mode == 'whole':
        return shape, shape
    if mode != 'slide':
        raise ValueError(f"test_cfg.mode must be 'slide' or 'whole', got {mode!r}")
    crop, stride = tuple(cfg['crop_size']), tuple(cfg['stride'])
    if any(not 0 < s <= c for c, s in zip(crop, stride, strict=True)):
        raise ValueError(f'test_cfg.stride must be within 1...crop_size, got stride {stride} with crop_size {crop}')
    return crop, stride


def _prepared_crops(pre: SegDataPreProcessor, image: Tensor) -> tuple[Callable, tuple[int, int], tuple]:
    """A function that crops an image (3, h, w) and preprocesses the crop; the image's padded shape; the padding."""
    height, width = image.shape[-2:]
    cfg = pre.test_cfg or {}
    if cfg.get('size') is not None:
        shape = max(height, cfg['size'][-2]), max(width, cfg['size'][-1])
    else:
        divisor = cfg.get('size_divisor') or 1
        shape = -(-height // divisor) * divisor, -(-width // divisor) * divisor

    # The first name is onedl-mmsegmentation's, the second that of mmsegmentation 1.2.2.
    swap = pre._channel_conversion if hasattr(pre, '_channel_conversion') else pre.channel_conversion

    def crop(top: int, left: int, rows: int, columns: int) -> Tensor:
        nonlocal image
        # Uploaded with the first window, while the device computes other views.
        image = _uploaded(image, pre.device)
        window = image[:, top : top + rows, left : left + columns]
        if swap and len(window) == 3:
            window = window.flip(0)
        window = window.float()
        if pre._enable_normalize:
            window = (window - pre.mean) / pre.std
        return F.pad(window, (0, columns - window.shape[2], 0, rows - window.shape[1]), value=pre.pad_val)

    return crop, shape, (0, shape[1] - width, 0, shape[0] - height)


def _uploaded(image: Tensor, device: torch.device) -> Tensor:
    """Copy the image to the device; to a GPU asynchronously, which needs pinned memory."""
    if image.device.type == 'cpu' and torch.device(device).type == 'cuda':
        image = image.pin_memory()
    return image.to(device, non_blocking=True)


def _results(
    segmentor: EncoderDecoder,
    network: WindowNetwork,
    images: list[list[View]],
    average: bool = False,
    sigmoid_twice: bool = False,
) -> list[dict[str, PixelData]]:
    """Class ids of each image, given by its views, and confidence and logits if ``test_cfg`` asks for them.

    ``average`` averages the probabilities of the views, as ``SegTTAModel`` does; without it each image has one view. If
    ``network.sampled`` is set, the results have ``sampled_probabilities``, or without ``average`` ``sampled_logits``,
    (C, ceil(H / SAMPLE_STEP), ceil(W / SAMPLE_STEP)).
    """
    C, cfg = segmentor.out_channels, segmentor.test_cfg
    device = network.device
    sample = 'sampled_probabilities' if average else 'sampled_logits'
    maps: list[dict[str, Tensor]] = []
    for views in images:
        shape = views[0].shape
        found = dict(pred_sem_seg=torch.empty(1, *shape, dtype=torch.int64 if C > 1 else torch.float32, device=device))
        if cfg.get('confidence'):
            found['seg_confidence'] = torch.empty(1, *shape, device=device)
        if cfg.get('return_logits'):
            found['seg_logits'] = torch.empty(C, *shape, device=device)
        if network.sampled:
            sizes = [-(-size // SAMPLE_STEP) for size in shape]
            found[sample] = torch.empty(C, *sizes, device=device)
        maps.append(found)

    with network.running():
        for n, along, across, tiles in network.stream(images):
            found = {name: data.mT if images[n][0].transposed else data for name, data in maps[n].items()}
            scores = None  # (R, C, T): logits, or probabilities summed over views
            for logits in tiles:
                score = logits
                if C == 1:
                    score = score.sigmoid()
                    if average and sigmoid_twice:
                        score = score.sigmoid()
                elif average:
                    score = score.softmax(1)
                scores = score if scores is None else scores.add_(score)
            if average:
                scores /= len(images[n])
            if C == 1:
                classes = (scores > segmentor.decode_head.threshold).to(scores)
            else:
                classes = scores.argmax(1, keepdim=True)
            found['pred_sem_seg'][0, along, across] = classes[:, 0]
            if sample in found:
                (rows, to_rows), (columns, to_columns) = map(_sampled, (along, across))
                source = scores if average else logits
                found[sample][:, to_rows, to_columns] = source[rows, :, columns].transpose(0, 1)
            if 'seg_logits' in found:
                found['seg_logits'][:, along, across] = scores.transpose(0, 1)
            if 'seg_confidence' in found:
                if C == 1:
                    found['seg_confidence'][0, along, across] = torch.where(classes > 0, scores, 1 - scores)[:, 0]
                else:
                    probabilities = scores if average else scores.softmax(1)
                    found['seg_confidence'][0, along, across] = probabilities.amax(1)
    return [{name: PixelData(data=data) for name, data in found.items()} for found in maps]


def _sampled(tile: slice) -> tuple[slice, slice]:
    """The sampled pixels of a tile along one axis, and their indices in the sample."""
    first = -(-tile.start // SAMPLE_STEP)
    return slice(first * SAMPLE_STEP - tile.start, None, SAMPLE_STEP), slice(first, -(-tile.stop // SAMPLE_STEP))
