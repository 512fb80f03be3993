"""mmseg's segmentor and test-time augmentation with streaming prediction (:mod:`mmseg_volo.models.streaming`)."""

import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from mmengine.model import is_model_wrapper
from mmengine.structures import PixelData
from mmseg.models import EncoderDecoder, SegTTAModel
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import SampleList
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..checkpoints.compatibility import check_weights
from ..utils.devices import check_device
from .inputs import check_images
from .overrides import can_stream, can_stream_views, is_plain_preprocessor, is_standard, same_result, windows_suffice
from .predictions import classes_of, complete, results_of, tiles_of_one
from .streaming import View
from .views import prepared_crops, view_of, windows_of
from .windows import WindowNetwork


@MODELS.register_module()
class StreamingEncoderDecoder(EncoderDecoder):
    """mmseg's :class:`EncoderDecoder` with the same weights, losses and logits, and predictions in little memory.

    Sliding windows run in batches, across images too, and a class map is computed one narrow band at a time: no tensor
    of C x H x W exists unless ``return_logits`` is set. Arguments are those of EncoderDecoder. ``test_cfg`` takes
    ``mode``, ``crop_size`` and ``stride``, and also the options below; it is read at each call:

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

    Where a subclass or an object has its own ``inference``, ``encode_decode``, ``postprocess_result`` or the like, or a
    decode head that reads more of the images' metadata than their size, and in training mode, mmseg's own ``predict``
    runs instead, and predictions have ``seg_logits`` (:mod:`mmseg_volo.models.overrides`).

    Raises:
        ValueError: an unknown precision, or a stride larger than ``crop_size``, which would leave pixels out.
        CheckpointError: on loading a checkpoint of another model.
        ConfigError: on moving to a device that does not exist.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.network = WindowNetwork(self, follows_training=True)
        self._initialising = False

    def init_weights(self) -> None:
        """Initialise as in mmengine. Files in ``init_cfg`` load as far as they fit, but must fit a frozen segmentor.

        Raises:
            CheckpointError: a file is of another model, and no parameter requires a gradient.
        """
        self._initialising = any(parameter.requires_grad for parameter in self.parameters())
        try:
            super().init_weights()
        finally:
            self._initialising = False

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
        # The runner and init_model have checked the file. mmseg's own entry points have not, and do not state the mode;
        # weights are initialised for training only.
        if not prefix:
            training = self._initialising or (self.is_init and self.training)
            check_weights(self, state_dict, 'train' if training else 'infer')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    @same_result
    def test_step(self, data: dict | tuple | list) -> SampleList:
        """Predict a batch from the data loader, as in mmengine.

        Raises:
            ValueError: an image has a wrong number of channels, or values outside the 8-bit range.
        """
        if isinstance(data, dict):
            check_images(self, data.get('inputs', ()), data.get('data_samples'))
        return _by_size(super().test_step, data)

    val_step = test_step  # as in mmengine, with the same check

    @same_result
    def predict(self, inputs: Tensor, data_samples: SampleList | None = None) -> SampleList:
        """Predict class ids for a batch of preprocessed images (N, 3, H, W).

        Returns:
            The data samples, or new ones, each with ``pred_sem_seg`` (1, h, w) of the original size, int64 (float32
            with one output channel, as in mmseg), and with ``seg_confidence`` and ``seg_logits`` if ``test_cfg`` asks
            for them.
        """
        if not can_stream(self):
            with self.network.options():
                samples = super().predict(inputs, data_samples)
            for sample in samples:
                complete(self.network, sample, average=False)
            if self.network.progress:
                self.network.progress(1, 1)
            return samples
        if data_samples is None:
            data_samples = [SegDataSample() for _ in inputs]
        views = [[view_of(self, sample, image)] for image, sample in zip(inputs, data_samples, strict=True)]
        for sample, result in zip(data_samples, results_of(self, self.network, views), strict=True):
            sample.set_data(result)
        return data_samples

    @property
    def predicts_windows(self) -> bool:
        """Whether :meth:`predict_windows` gives the result of :meth:`predict`, since nothing is overridden."""
        return can_stream_views(self) and is_plain_preprocessor(self.data_preprocessor)

    def predict_windows(
        self, size: tuple[int, int], read: Callable[[int, int, int, int], Tensor], by_rows: bool = False
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        """Predict an image that need not fit into memory: read its windows when they are due.

        Args:
            size: (height, width) of the image.
            read: returns the image's pixels (C, rows, columns) at ``(top, left, rows, columns)``, before the data
                preprocessor.
            by_rows: go from top to bottom, also if the image is wider than high.

        Yields:
            The rows and columns of a tile, its class ids, and with ``test_cfg.confidence`` the probability of these
            classes, (rows, columns) each. The ids are those of :meth:`predict` for the whole image, bit for bit unless
            ``by_rows`` changes the order in which windows are added.

        Raises:
            ValueError: something is overridden, so that the image has to be predicted at once.
        """
        if not self.predicts_windows:
            raise ValueError(
                'the model cannot predict window by window: it, its head or its preprocessor is an own one'
            )
        view = view_of(
            self, SegDataSample(metainfo=dict(ori_shape=size)), *prepared_crops(self.data_preprocessor, size, read)
        )
        view = View(view.crop, view.rows, view.columns, False if by_rows else None, known={})
        yield from tiles_of_one(self, self.network, view)

    @same_result
    def slide_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of preprocessed images (N, 3, H, W); overlapping windows are averaged."""
        if not self._streams('slide_inference'):
            return super().slide_inference(inputs, batch_img_metas)
        return self._logits(inputs, 'slide')

    @same_result
    def whole_inference(self, inputs: Tensor, batch_img_metas: Sequence[dict] = ()) -> Tensor:
        """Logits (N, C, H, W) of preprocessed images (N, 3, H, W)."""
        if not self._streams('whole_inference'):
            return super().whole_inference(inputs, batch_img_metas)
        return self._logits(inputs, 'whole')

    def _streams(self, name: str) -> bool:
        return windows_suffice(self) and is_standard(self, name, below=StreamingEncoderDecoder)

    def _logits(self, inputs: Tensor, mode: str) -> Tensor:
        views = [[view_of(self, SegDataSample(), image, mode=mode)] for image in inputs]
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

    Where a subclass or an object has its own ``merge_preds``, or ``module`` cannot stream or has forward hooks, each
    view runs through ``module.test_step`` and ``merge_preds`` merges them, as in mmengine.

    Args:
        module: an :class:`EncoderDecoder` of this package or mmseg, or another segmentor, or its config; it may be in a
            wrapper such as MMDistributedDataParallel. It may be replaced later.
        sigmoid_twice: for heads with one output channel. mmseg's SegTTAModel applies a second sigmoid to the output of
            ``predict``, so that no value is below 0.5. True does the same; False averages the probabilities.
    """

    def __init__(
        self, module: nn.Module | dict, data_preprocessor: nn.Module | dict | None = None, sigmoid_twice: bool = False
    ):
        super().__init__(module, data_preprocessor)
        self.sigmoid_twice = sigmoid_twice
        self._network: WindowNetwork | None = None  # of a segmentor that has none of its own
        head = getattr(self.segmentor, 'decode_head', None)
        if sigmoid_twice and getattr(head, 'out_channels', None) == 1 and head.threshold <= 0.5:
            warnings.warn(
                "as in mmseg's SegTTAModel, the sigmoid is applied twice, so every pixel is over the threshold "
                f'{head.threshold}; without sigmoid_twice=True, the probabilities are averaged',
                stacklevel=2,
            )

    @property
    def segmentor(self) -> nn.Module:
        """``module`` without its wrapper."""
        segmentor = self.module
        while is_model_wrapper(segmentor):
            segmentor = segmentor.module
        return segmentor

    @property
    def network(self) -> WindowNetwork | None:
        """The network of the segmentor that ``module`` is now; None if that is no EncoderDecoder."""
        segmentor = self.segmentor
        if isinstance(segmentor, StreamingEncoderDecoder):
            return segmentor.network
        if isinstance(segmentor, EncoderDecoder) and getattr(self._network, 'segmentor', None) is not segmentor:
            self._network = WindowNetwork(segmentor)
        return self._network if isinstance(segmentor, EncoderDecoder) else None

    def test_step(self, data: dict | tuple | list) -> SampleList:
        """Predict images from their views.

        Args:
            data: ``inputs`` and ``data_samples``, each a list over views of lists over images, as ``TestTimeAug`` with
                ``pseudo_collate`` returns them.

        Returns:
            The data sample of each image's first view, with the merged prediction.
        """
        streams = isinstance(data, dict) and is_standard(self, 'merge_preds') and can_stream_views(self.segmentor)
        if streams and not isinstance(self.module, FullyShardedDataParallel):  # which gathers weights in its forward
            return self._streamed(data)
        return self._view_by_view(data)

    @same_result
    def merge_preds(self, data_samples_list: Sequence[SampleList]) -> SampleList:
        """Merge the predictions of each image's views, which have ``seg_logits``.

        Returns:
            The data sample of each image's first view, with the merged prediction; its ``seg_logits`` are the average.
        """
        several = self.segmentor.out_channels > 1
        for samples in data_samples_list:
            scores = [sample.seg_logits.data for sample in samples]
            if several:
                scores = [one.softmax(0) for one in scores]
            elif self.sigmoid_twice:
                scores = [one.sigmoid() for one in scores]
            average = sum(scores) / len(scores)
            classes = classes_of(self.segmentor, average, dim=0)
            samples[0].set_data(dict(pred_sem_seg=PixelData(data=classes), seg_logits=PixelData(data=average)))
        return [samples[0] for samples in data_samples_list]

    def _view_by_view(self, data: dict | tuple | list) -> SampleList:
        network = self.network
        if network is None:
            return super().test_step(data)
        sampled = network.sampled
        network.logits, network.sampled = True, False
        try:
            with network.options():
                merged = super().test_step(data)
        finally:
            network.logits, network.sampled = False, sampled
        if is_standard(self, 'merge_preds'):
            for sample in merged:
                complete(network, sample, average=True)
                if not (network.segmentor.test_cfg or {}).get('return_logits'):
                    del sample.seg_logits
        return merged

    @torch.no_grad()
    def _streamed(self, data: dict) -> SampleList:
        views: list[list[View]] = [[] for _ in data['inputs'][0]]
        for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True):
            check_images(self.segmentor, inputs, samples)
            for n, view in enumerate(self._views(inputs, samples)):
                views[n].append(view)
        samples = data['data_samples'][0]
        results = results_of(self.segmentor, self.network, views, average=True, sigmoid_twice=self.sigmoid_twice)
        for sample, result in zip(samples, results, strict=True):
            sample.set_data(result)
        return samples

    def _views(self, inputs: Sequence[Tensor], samples: SampleList) -> list[View]:
        preprocessor = self.segmentor.data_preprocessor
        if is_plain_preprocessor(preprocessor):
            # It is pixel-wise: applied to windows, it leaves the view in 8 bits.
            crops = [
                prepared_crops(preprocessor, image.shape[-2:], windows_of(image, preprocessor.device))
                for image in inputs
            ]
            return [view_of(self.segmentor, sample, *crop) for sample, crop in zip(samples, crops, strict=True)]
        # One by one: it may stack a batch, which takes images of one size only.
        prepared = [
            preprocessor(dict(inputs=[image], data_samples=[sample]), False)
            for image, sample in zip(inputs, samples, strict=True)
        ]
        return [view_of(self.segmentor, one['data_samples'][0], one['inputs'][0]) for one in prepared]


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
