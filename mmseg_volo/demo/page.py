"""The demo page in Gradio: upload an image, compare it with the prediction, download the result."""

import html
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import cv2
import gradio as gr
import numpy as np
import torch

from ..errors import ConfigError
from ..inference.predictor import Prediction
from ..inference.visualize import overlay
from .shared_model import SharedModel, Stopped
from .uploads import FORMATS, Limits, RefusedImage, read_upload

KEPT = 3600  # seconds that a visitor's file stays on the server
_LONGEST = 1280  # pixels of the longer side on the page; downloads have the image's own size
_OPACITY = 0.6  # of the class colours over the image
# Only ImageSlider has a maximum height of its own.
CSS = '#classes .image-container img, #confidence img { max-height: 70vh; object-fit: contain; }'
_NO_MEMORY = 'The device does not have enough memory for this image. Try a smaller one, or without multi-scale.'


class Page:
    """The page.

    Args:
        model: makes the predictions.
        title, about: plain text for the heading.
        limits: on uploads.
        queue: how many predictions may wait; later visitors are asked to try again.
        examples: image files to offer.

    Attributes:
        blocks: the page, to be launched by Gradio.
    """

    def __init__(
        self,
        model: SharedModel,
        title: str,
        about: str = '',
        limits: Limits = Limits(),  # noqa: B008  (a tuple)
        queue: int = 16,
        examples: Sequence[Path] = (),
    ):
        self._model, self._limits = model, limits
        self._running: dict[threading.Event, str | None] = {}  # flag that stops a prediction -> its session
        names = [str(name) for name in model.classes]
        # AnnotatedImage tells classes apart by their names.
        self._names = [n if n and names.count(n) == 1 else f'{n or "class"} {i}' for i, n in enumerate(names)]
        self._colours = ['#{:02x}{:02x}{:02x}'.format(*map(int, colour)) for colour in model.palette]
        with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, KEPT), fill_width=True) as self.blocks:
            self._lay_out(title, about, examples)
        self.blocks.queue(max_size=queue, default_concurrency_limit=1, api_open=False)

    def _lay_out(self, title: str, about: str, examples: Sequence[Path]) -> None:
        model = self._model
        gr.HTML(self._heading(title, about))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    type='filepath',
                    label='Image',
                    sources=['upload', 'clipboard'],
                    buttons=[],
                    height=260,
                    elem_id='image',
                    placeholder=f'Drop an image here or click to choose one\n{FORMATS}',
                )
                image.async_move_resource_to_block_cache = _uploaded_only(image.async_move_resource_to_block_cache)
                multi_scale = gr.Checkbox(
                    label='Multi-scale and flip: more accurate, several times slower', visible=model.multi_scale
                )
                precision = gr.Radio(
                    model.precisions,
                    value=model.precisions[0] if model.precisions else None,
                    label='Precision',
                    visible=len(model.precisions) > 1,
                )
                with gr.Row():
                    run = gr.Button('Predict', variant='primary', min_width=120, elem_id='predict')
                    stop = gr.Button('Stop', min_width=120, elem_id='stop')
                gr.Markdown(
                    f'At most {self._limits.megabytes:g} MB and {self._limits.megapixels:g} megapixels. The server '
                    f'deletes images and results after {KEPT // 60} minutes, and when it ends.'
                )
                if examples:
                    gr.Examples([[str(p)] for p in examples], image, api_visibility='private', elem_id='examples')
            with gr.Column(scale=5, min_width=300, elem_id='results'):
                with gr.Tab('Compare'):
                    slider = gr.ImageSlider(label='Image and prediction', interactive=False, elem_id='slider')
                with gr.Tab('Classes'):
                    classes = gr.AnnotatedImage(label='Point at a class to see it alone', elem_id='classes')
                with gr.Tab('Confidence', visible=model.confidence):
                    confidence = gr.Image(
                        label='From unsure (dark) to sure (yellow)',
                        interactive=False,
                        buttons=['download', 'fullscreen'],
                        elem_id='confidence',
                    )
                note = gr.Markdown(elem_id='note')
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(
                            f'Download {what}', interactive=False, min_width=120, elem_id=f'download-{id}'
                        )
                        for what, id in (('class ids', 'ids'), ('overlay', 'overlay'))
                    ]
        prediction = run.click(
            self._predict,
            [image, multi_scale, precision],
            [slider, classes, confidence, note, *downloads],
            preprocess=False,  # Gradio would decode the file before its size is checked
            scroll_to_output=True,
            show_progress_on=slider,
            api_visibility='private',
        )
        stop.click(self._leave, cancels=prediction, queue=False, api_visibility='private')
        self.blocks.unload(self._leave)

    def sessions(self) -> set[str | None]:
        """The sessions whose predictions run or wait for the model."""
        return set(self._running.values())

    def stop(self) -> None:
        """End all predictions, and wait until they have ended."""
        while self._running:
            for flag in list(self._running):
                flag.set()
            time.sleep(0.02)

    def _leave(self, request: gr.Request) -> None:
        """End the predictions of one session."""
        for flag, session in list(self._running.items()):
            if session == request.session_hash:
                flag.set()

    def _predict(
        self,
        upload: dict | None,
        multi_scale: bool,
        precision: str | None,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  (Gradio finds it by this default)
    ) -> tuple:
        flag = threading.Event()
        self._running[flag] = request.session_hash

        def step(done: int, total: int) -> None:
            if flag.is_set():
                raise Stopped
            progress(done / total, desc=f'{done} of {total} windows' if done else 'Preparing the image')

        try:
            with _clear_errors():
                if not upload or not upload['path']:
                    raise RefusedImage('Choose an image first.')
                path = Path(upload['path'])
                read = partial(self._model.read, multi_scale=bool(multi_scale))
                loaded = read_upload(path, self._limits.megapixels, read)
                image = loaded.shown()
                started = time.monotonic()
                prediction = self._model.predict(loaded, bool(multi_scale), precision, step)
                seconds = time.monotonic() - started
                how = ', '.join(filter(None, ('multi-scale' if multi_scale else 'single scale', precision)))
                note = f'{image.shape[1]} x {image.shape[0]} pixels, {how}, {seconds:.1f} s'
                return *self._shown(image, prediction), note, *self._saved(image, prediction, path.stem)
        finally:
            del self._running[flag]

    def _shown(self, image: np.ndarray, prediction: Prediction) -> tuple:
        """Values of the slider, the class masks and the confidence map."""
        height, width = image.shape[:2]
        scale = min(1, _LONGEST / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        counts = np.bincount(prediction.classes.ravel(), minlength=len(self._names))
        present = sorted(np.flatnonzero(counts), key=lambda i: -counts[i])
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ids = cv2.resize(prediction.classes.astype(np.uint16), size, interpolation=cv2.INTER_NEAREST)
        over = overlay(small, ids.astype(np.int64), self._model.palette, _OPACITY)[..., ::-1]
        labels = {i: f'{self._names[i]} {100 * counts[i] / prediction.classes.size:.1f} %' for i in present}
        masks = gr.update(
            value=(small[..., ::-1], [((ids == i) * _OPACITY, label) for i, label in labels.items()]),
            color_map={label: self._colours[i] for i, label in labels.items()},
        )
        sure = None
        if prediction.confidence is not None:
            sure = cv2.applyColorMap(np.uint8(prediction.confidence * 255), cv2.COLORMAP_VIRIDIS)
            sure = cv2.resize(sure, size, interpolation=cv2.INTER_AREA)[..., ::-1]
        return (small[..., ::-1], over), masks, sure

    def _saved(self, image: np.ndarray, prediction: Prediction, stem: str) -> list[dict]:
        """The download buttons with their files, named and made as those of ``tools/predict.py``."""
        folder = Path(tempfile.mkdtemp(prefix='result_', dir=self.blocks.GRADIO_CACHE))
        files = {
            f'{stem}_classes.png': prediction.classes.astype(np.uint8 if len(self._names) <= 256 else np.uint16),
            f'{stem}_overlay.png': overlay(image, prediction.classes, self._model.palette),
        }
        for name, pixels in files.items():
            (folder / name).write_bytes(cv2.imencode('.png', pixels)[1].tobytes())
        return [gr.update(value=str(folder / name), interactive=True) for name in files]

    def _heading(self, title: str, about: str) -> str:
        """Title and list of classes; names come from checkpoints, so they are escaped."""
        classes = ' '.join(
            f'<span style="white-space: nowrap"><span style="color: {colour}">⬤</span> {html.escape(name)}</span>&ensp;'
            for name, colour in zip(self._names, self._colours, strict=True)
        )
        return (
            f'<h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>'
            f'<details><summary>{len(self._names)} classes</summary>{classes}</details>'
        )


def _uploaded_only(move: Callable) -> Callable:
    """Refuse an address in place of an upload: Gradio would download it."""

    async def move_upload(path: str | Path | None) -> str | None:
        if path and '://' in str(path):
            raise gr.Error('This is not an uploaded image.', print_exception=False)
        return await move(path)

    return move_upload


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Turn what can go wrong with one image into a message for its owner."""
    try:
        yield
    except Stopped as error:
        raise gr.Error('Stopped.', print_exception=False) from error
    except (RefusedImage, ConfigError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise gr.Error(_NO_MEMORY, print_exception=False) from error
    except ValueError as error:
        raise gr.Error(f'This image cannot be predicted: {error}', print_exception=False) from error
    except Exception as error:
        logging.getLogger(__name__).exception('a prediction failed')
        raise gr.Error('The prediction failed; the server log has the reason.', print_exception=False) from error
