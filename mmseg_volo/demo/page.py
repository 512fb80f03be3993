"""The page in Gradio: a picture goes in, the viewer of ``viewer.js`` shows what came out."""

import html
import logging
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import gradio as gr
import torch

from ..datasets.street_drawing import draw_scene
from ..errors import ConfigError
from . import result
from .model import SharedModel, Stopped
from .uploads import KINDS, Limits, RefusedPicture, read_upload

FOLDER = Path(__file__).parent
KEPT = 3600  # seconds after its last use that a file of a visitor stays
_EXAMPLES = (9, 4, 21)  # seeds of drawn street scenes
_NO_MEMORY = 'The device has not enough memory for this picture. Try a smaller one, or without multi-scale.'

# On a phone the viewer is below what was pressed.
_LOOK = """(...inputs) => {
  const viewer = document.querySelector('#viewer');
  if (viewer.getBoundingClientRect().top > innerHeight / 2) viewer.scrollIntoView({ behavior: 'smooth' });
  return inputs;
}"""


def _upload(folder: Path, **options) -> gr.Image:
    """``gr.Image`` that hands on a file in ``folder`` as it came, for :mod:`mmseg_volo.demo.uploads` to look into.

    Not a subclass: beside the source of one, Gradio writes a .pyi file.
    """
    picture = gr.Image(type='filepath', **options)
    move = picture.async_move_resource_to_block_cache

    async def move_file(path: str | Path | None) -> str | None:
        # Gradio would take addresses and fetch them, and in some settings any file of this machine.
        if path and not Path(path).resolve().is_relative_to(folder):
            raise gr.Error('This is no uploaded picture: upload it first.', print_exception=False)
        return await move(path)

    picture.preprocess = lambda payload: payload and payload.path
    picture.async_move_resource_to_block_cache = move_file
    return picture


class Visits:
    """The predictions under way, by the session of the page that asked for them."""

    def __init__(self):
        self._flags: set[tuple[str | None, threading.Event]] = set()
        self._lock = threading.Lock()

    @contextmanager
    def flag(self, session: str | None):
        """A flag for one prediction, set by :meth:`stop`."""
        entry = session, threading.Event()
        with self._lock:
            self._flags.add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._flags.discard(entry)

    def stop(self, session: str | None = None) -> None:
        """Tell a session's predictions to end, or all."""
        with self._lock:
            for owner, flag in self._flags:
                if session in (None, owner):
                    flag.set()


def build(model: SharedModel, title: str, about: str, limits: Limits, queue: int, visits: Visits) -> gr.Blocks:
    """The page.

    Args:
        model: answers.
        title: plain text, of the page and its first heading.
        about: plain text under it.
        limits: of pictures.
        queue: how many may wait; who comes then is told to come again.
        visits: gets the predictions under way.
    """
    folder = Path(os.environ['GRADIO_TEMP_DIR'])

    def predict(
        picture: str | None,
        multi_scale: bool,
        precision: str | None,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  (Gradio finds it by this default)
    ) -> tuple[dict, str, str]:
        if picture is None:
            raise gr.Error('Choose a picture first: drop one into the box, or click an example.', print_exception=False)
        with visits.flag(request.session_hash) as stopped, _words():
            image = read_upload(picture, limits)
            os.utime(picture)  # used now: files go by age
            started = time.monotonic()

            def step(done: int, total: int) -> None:
                nonlocal started
                if stopped.is_set():
                    raise Stopped
                if done == 0:
                    started = time.monotonic()
                    progress(0.0, desc='Preparing the picture')
                else:
                    progress(done / total, desc=f'{done} of {total} windows')

            found = model.predict(image, multi_scale, precision, step)
            seconds = time.monotonic() - started
            shown = result.shown(image, found, model.classes, model.palette)
            how = ', '.join(filter(None, ('multi-scale' if multi_scale else 'single scale', precision)))
            shown['note'] = f'{shown["width"]} x {shown["height"]} pixels, {how}, {seconds:.1f} s'
            # A name that nobody guesses: what one visitor gets is served to no other.
            own = Path(tempfile.mkdtemp(dir=folder))
            return shown, *result.save(image, found, model.classes, model.palette, own, Path(picture).stem)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, KEPT), fill_width=True) as page:
        gr.HTML(_intro(title, about, model.classes, model.palette), elem_id='intro')
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = _upload(
                    folder,
                    label='Picture',
                    sources=['upload', 'clipboard'],
                    buttons=[],
                    height=260,
                    elem_id='picture',
                    placeholder=f'Drop a picture here or click to choose one\n{KINDS}',
                )
                multi_scale = gr.Checkbox(
                    label='Multi-scale and flip: better, and several times slower', visible=model.multi_scale
                )
                precision = gr.Radio(
                    model.precisions,
                    value=model.precisions[0] if model.precisions else None,
                    label='Precision of the arithmetic',
                    visible=len(model.precisions) > 1,
                )
                with gr.Row():
                    run = gr.Button('Predict', variant='primary', min_width=120, elem_id='predict')
                    stop = gr.Button('Stop', min_width=120, elem_id='stop')
                gr.Markdown(
                    f'At most {limits.megabytes:g} MB and {limits.megapixels:g} megapixels. The server deletes '
                    f'pictures and results {KEPT // 60} minutes after their last use, and when it ends.',
                    elem_id='limits',
                )
                gr.Examples(
                    _draw_examples(folder), inputs=picture, cache_examples=False, label='Examples', elem_id='examples'
                )
            with gr.Column(scale=5, min_width=300):
                viewer = gr.HTML(
                    html_template='<div class="volo-viewer"></div><p class="volo-hidden" role="status"></p>',
                    js_on_load=(FOLDER / 'viewer.js').read_text(encoding='utf-8'),
                    elem_id='viewer',
                    min_height=160,
                )
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(text, interactive=False, min_width=120, elem_id=name)
                        for text, name in (
                            ('Download class ids', 'download-classes'),
                            ('Download overlay', 'download-overlay'),
                        )
                    ]
        going = run.click(
            predict,
            [picture, multi_scale, precision],
            [viewer, *downloads],
            api_name='predict',
            concurrency_limit=1,
            show_progress_on=viewer,
            js=_LOOK,
        )

        going.success(lambda: [gr.update(interactive=True)] * 2, None, downloads, queue=False, api_visibility='private')

        def leave(request: gr.Request) -> None:
            visits.stop(request.session_hash)

        stop.click(leave, cancels=going, queue=False, api_visibility='private')
        page.unload(leave)
    return page.queue(max_size=queue, api_open=False)


@contextmanager
def _words():
    """Turn what can go wrong with one picture into words for who gave it."""
    try:
        yield
    except Stopped as error:
        raise gr.Error('Stopped.', print_exception=False) from error
    except (RefusedPicture, ConfigError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        raise gr.Error(_NO_MEMORY, print_exception=False) from error
    except ValueError as error:
        raise gr.Error(f'This picture cannot be predicted: {error}', print_exception=False) from error
    except Exception as error:
        logging.getLogger(__name__).exception('a prediction failed')
        raise gr.Error('The prediction failed; the log of the server says why.', print_exception=False) from error


def _draw_examples(folder: Path) -> list[list[str]]:
    place = folder / 'examples'
    place.mkdir(exist_ok=True)
    paths = [place / f'street_{seed}.png' for seed in _EXAMPLES]
    for seed, path in zip(_EXAMPLES, paths, strict=True):
        path.write_bytes(cv2.imencode('.png', draw_scene(seed)[0])[1].tobytes())
    return [[str(path)] for path in paths]


def _intro(title: str, about: str, classes: Sequence[str], palette: Sequence[Sequence[int]]) -> str:
    """The heading and the list of classes; names come from checkpoints, so nothing in them is taken for HTML."""
    chips = ''.join(
        f'<li><span class="volo-chip" style="background:rgb({r},{g},{b})"></span>{html.escape(str(name))}</li>'
        for name, (r, g, b) in zip(classes, ([int(c) for c in colour] for colour in palette), strict=True)
    )
    return (
        f'<div class="volo-intro"><h1>{html.escape(title)}</h1><p>{html.escape(about)}</p>'
        f'<details><summary>{len(classes)} classes</summary><ul>{chips}</ul></details></div>'
    )
