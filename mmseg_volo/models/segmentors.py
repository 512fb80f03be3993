"""mmseg's segmentor and test-time augmentation, with predictions streamed as in :mod:`mmseg_volo.models.streaming`."""

import math
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
from .streaming import View, axis
from .windows import WindowNetwork

# Every 7th pixel in both directions is in the sample that evaluation takes: 43,000 pixels of 1024 x 2048. The step is
# odd, so that the pixels lie at all places between two logits, whose grid is 4, 8 or 16 pixels wide.
SAMPLE_STEP = 7


@MODELS.register_module()
class StreamingEncoderDecoder(EncoderDecoder):
    """mmseg's :class:`EncoderDecoder`, with the same weights, losses and logits, and predictions that fit in memory.

    Sliding windows run in batches over windows and pictures, and a class map is made a narrow band at a time: no
    tensor of picture x classes exists unless ``return_logits`` asks for it. Other arguments are EncoderDecoder's;
    ``test_cfg`` takes, besides ``mode``, ``crop_size`` and ``stride``:

    - ``window_batch``: windows in one forward pass; by default 2 of 1024 x 1024 pixels on a GPU, or 1 of 512 x 512 on a
      CPU, and as many more as they are smaller. On a GPU it is halved when memory runs out.
    - ``precision``: 'fp32', 'bf16' or 'fp16' (autocast); by default whatever the caller has set.
    - ``compile``: run the network through ``torch.compile``: of VOLO the blocks and the stem, each kind compiled once
      for all its blocks; another network as a whole.
    - ``cuda_graph``: replay a CUDA graph where windows of one number and shape come again. By default on a GPU, for
      VOLO in eval mode, without gradients, hooks and ``compile``, after the third such batch; True for other networks
      and with ``compile`` too, after the first one; False never. A graph follows the weights, but not Python attributes
      of modules that are changed after predictions have been made.
    - ``channels_last``: keep the weights of convolutions in that memory format.
    - ``confidence``: predictions carry ``seg_confidence`` (1, H, W), the probability of the class that was chosen.
    - ``return_logits``: predictions carry ``seg_logits`` (C, H, W), as EncoderDecoder's always do. An evaluation takes
      the logits of a sample of pixels instead, ``sampled_logits``, which ``network.sampled`` switches on.
    - ``allow_mismatch``: take checkpoints of other models, as far as they fit
      (:func:`~mmseg_volo.checkpoints.compatibility.check_weights`).

    Raises:
        ValueError: an unknown precision, or a stride over ``crop_size``, which would leave pixels without a window.
        CheckpointError: when loading a checkpoint of another model.
        ConfigError: when moved to a device that is not there.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.network = WindowNetwork(self, follows_training=True)

    def train(self, mode: bool = True) -> nn.Module:
        """As in PyTorch; either mode begins without what predictions have kept."""
        self.network.graphs.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> nn.Module:
        self.network.graphs.clear()  # moved or converted weights, whose memory should be free at once
        return super()._apply(*args, **kwargs)

    def to(self, *args, **kwargs) -> nn.Module:
        """As in mmengine, for devices that there are."""
        for place in (*args[:1], kwargs.get('device')):
            check_device(place)
        return super().to(*args, **kwargs)

    def cuda(self, device: int | str | torch.device | None = None) -> nn.Module:
        """As in mmengine, for devices that there are."""
        check_device('cuda' if device is None else device)
        return super().cuda(device)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *args) -> None:
        # mmseg's own entry points load without a check. The runner and init_model have checked already.
        if not prefix:
            check_weights(self, state_dict, 'infer')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def test_step(self, data: dict | tuple | list) -> SampleList:
        """As in mmengine, for pictures that the preprocessor is made for.

        Raises:
            ValueError: a wrong number of channels, or values that are not of an 8-bit picture.
        """
        if isinstance(data, dict):
            _check_pictures(self.data_preprocessor, data.get('inputs', ()), data.get('data_samples'))
        return super().test_step(data)

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: SampleList | None = None) -> SampleList:
        """Class ids for a batch of prepared pictures (N, 3, H, W).

        Returns:
            The data samples, or new ones, each with ``pred_sem_seg`` (1, h, w) in its original size, int64 (one class:
            0 or 1 in float32, as in mmseg), and what ``test_cfg`` asks for.
        """
        if data_samples is None:
            data_samples = [SegDataSample() for _ in inputs]
        views = [[_view(self, sample, image)] for image, sample in zip(inputs, data_samples, strict=True)]
        for sample, result in zip(data_samples, _results(self, self.network, views), strict=True):
            sample.set_data(result)
        return data_samples

    def slide_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of pictures (N, 3, H, W) in overlapping windows, averaged where they overlap."""
        return self._logits(inputs)

    def whole_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of pictures (N, 3, H, W)."""
        return self._logits(inputs)

    def _logits(self, inputs: Tensor) -> Tensor:
        views = [[_view(self, SegDataSample(), image)] for image in inputs]
        logits = inputs.new_empty(len(inputs), self.out_channels, *inputs.shape[2:])
        with self.network.running():
            for n, along, across, tiles in self.network.stream(views):
                target = logits[n].mT if views[n][0].turned else logits[n]
                target[:, along, across] = next(tiles).transpose(0, 1)
        return logits


@MODELS.register_module()
class StreamingTTAModel(SegTTAModel):
    """mmseg's :class:`SegTTAModel`, which adds each view to the average as it comes.

    All views of a picture go along it together, a narrow band at a time, so that of none the full-size logits exist.
    The windows of views that are of one size share batches. The average is of probabilities, as in mmseg; where
    ``test_cfg.return_logits`` asks for it, ``seg_logits`` (C, H, W) is this average, and ``seg_confidence`` comes as in
    :class:`StreamingEncoderDecoder`.

    Args:
        module: an :class:`EncoderDecoder`, this package's or mmseg's, or its config.
        sigmoid_twice: for heads with one output channel. mmseg's SegTTAModel takes the sigmoid of what ``predict`` has
            already put through one, so that no view falls under 0.5. True does the same, for equal results; False
            averages the probabilities.

    Raises:
        TypeError: another kind of model.
    """

    def __init__(
        self, module: nn.Module | dict, data_preprocessor: nn.Module | dict | None = None, sigmoid_twice: bool = True
    ):
        super().__init__(module, data_preprocessor)
        if not isinstance(self.module, EncoderDecoder):
            raise TypeError(
                f'StreamingTTAModel needs an EncoderDecoder, got {type(self.module).__name__}; use SegTTAModel with it'
            )
        self.sigmoid_twice = sigmoid_twice
        if self.module.out_channels == 1 and sigmoid_twice and self.module.decode_head.threshold <= 0.5:
            warnings.warn(
                "as in mmseg's SegTTAModel, the sigmoid is taken twice, so every pixel is over the threshold "
                f'{self.module.decode_head.threshold}; tta_model=dict(sigmoid_twice=False) averages the probabilities',
                stacklevel=2,
            )
        own = isinstance(self.module, StreamingEncoderDecoder)
        self.network = self.module.network if own else WindowNetwork(self.module)

    @torch.no_grad()
    def test_step(self, data: dict) -> SampleList:
        """Predict pictures from their views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list over views of lists over pictures, as
                ``TestTimeAug`` with ``pseudo_collate`` gives them.

        Returns:
            The data sample of each picture's first view, with the merged prediction.
        """
        views: list[list[View]] = [[] for _ in data['inputs'][0]]
        for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
            _check_pictures(self.module.data_preprocessor, inputs, samples)
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
            # It works on each pixel apart: done on windows, the view stays in 8 bits.
            crops = [_prepared_crops(preprocessor, image) for image in inputs]
            return [_view(self.module, sample, *crop) for sample, crop in zip(samples, crops, strict=True)]
        prepared = preprocessor(dict(inputs=inputs, data_samples=samples), False)
        return [
            _view(self.module, sample, image)
            for sample, image in zip(prepared['data_samples'], prepared['inputs'], strict=True)
        ]


def _check_pictures(pre: nn.Module, images: Sequence[Tensor], samples: SampleList | None) -> None:
    """Refuse pictures (3 or 1, H, W) that are not 8 bits deep where the model's mean and deviation are for those."""
    if not isinstance(pre, SegDataPreProcessor) or not pre._enable_normalize:
        return
    for image, sample in zip(images, samples or [None] * len(images), strict=False):
        if image.dtype == torch.uint8 and image.dim() == 3 and len(image) in (1, 3):
            continue
        what = f'a picture of shape {tuple(image.shape)}, {str(image.dtype).removeprefix("torch.")}'
        if image.dim() != 3 or (pre.mean.numel() == 3 and len(image) not in (1, 3)):
            raise ValueError(f'{what}: expected (3, H, W); mmseg takes arrays as (H, W, 3), BGR, uint8')
        if pre.mean.max() <= 1:  # made for another range
            continue
        values = image.float()
        low, high = values.min().item(), values.max().item()
        if not math.isfinite(low + high):
            raise ValueError(f'{what}: has values that are not finite')
        # Up to twice 255 may come from a resize that overshoots. Small ones are told apart where no file says 8 bits.
        given_as_array = sample is not None and sample.metainfo.get('img_path', '') is None
        if high > 510 or (given_as_array and 0 < high <= (16 if low < 0 else 1)):
            raise ValueError(
                f'{what}: values from {low:.4g} to {high:.4g}, expected 0 to 255; mmseg_volo.inference.Predictor '
                'converts pictures of 16 bits or of 0 to 1'
            )


def _view(
    segmentor: EncoderDecoder,
    sample: SegDataSample,
    image: Tensor | Callable,
    shape: tuple[int, int] | None = None,
    padding: Sequence[int] | None = None,
) -> View:
    """The view that a data sample describes, of a prepared image (3, H, W), or of crops from one of this shape."""
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
    """Size and stride of the windows in a view of this shape: one window where the mode is 'whole'."""
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
    """Crops of an image (3, h, w) as ``pre`` would give them, the shape that it would pad it to, and the padding."""
    height, width = image.shape[-2:]
    cfg = pre.test_cfg or {}
    if cfg.get('size') is not None:
        shape = max(height, cfg['size'][-2]), max(width, cfg['size'][-1])
    else:
        divisor = cfg.get('size_divisor') or 1
        shape = -(-height // divisor) * divisor, -(-width // divisor) * divisor

    # The first name is the maintained mmsegmentation's, the second that of 1.2.2.
    swap = pre._channel_conversion if hasattr(pre, '_channel_conversion') else pre.channel_conversion

    def crop(top: int, left: int, rows: int, columns: int) -> Tensor:
        nonlocal image
        # With its first window, while the device is at work on other views.
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
    """The image on the device; to a GPU it goes without waiting, which needs pinned memory."""
    if image.device.type == 'cpu' and torch.device(device).type == 'cuda':
        image = image.pin_memory()
    return image.to(device, non_blocking=True)


def _results(
    segmentor: EncoderDecoder,
    network: WindowNetwork,
    pictures: list[list[View]],
    average: bool = False,
    sigmoid_twice: bool = False,
) -> list[dict[str, PixelData]]:
    """Class ids of each picture, and the confidence and the logits where ``test_cfg`` asks for them.

    ``average`` takes the mean of the views' probabilities, as ``SegTTAModel`` does; without it there is one view. Where
    ``network.sampled`` is set, the results have ``sampled_probabilities``, or without ``average`` ``sampled_logits``,
    (C, ceil(H / SAMPLE_STEP), ceil(W / SAMPLE_STEP)).
    """
    C, cfg = segmentor.out_channels, segmentor.test_cfg
    device = network.device
    sample = 'sampled_probabilities' if average else 'sampled_logits'
    maps: list[dict[str, Tensor]] = []
    for views in pictures:
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
        for n, along, across, tiles in network.stream(pictures):
            found = {name: data.mT if pictures[n][0].turned else data for name, data in maps[n].items()}
            scores = None  # (R, C, T): what the class is chosen by
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
                scores /= len(pictures[n])
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
    """The pixels of a tile that are in the sample, and their places in it; along one axis."""
    first = -(-tile.start // SAMPLE_STEP)
    return slice(first * SAMPLE_STEP - tile.start, None, SAMPLE_STEP), slice(first, -(-tile.stop // SAMPLE_STEP))
