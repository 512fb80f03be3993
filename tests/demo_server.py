"""The demo page of a tiny model behind a running server, and files to upload: shared by the demo's tests."""

import io
import json
import os
import struct
import tempfile
import zlib
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import write_config

from mmseg_volo.demo.shared_model import SharedModel
from mmseg_volo.demo.uploads import Limits
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model

LIMITS = Limits(megapixels=1, megabytes=1)


def random_image(seed: int = 0, height: int = 96, width: int = 160) -> np.ndarray:
    """Blobs of random colours, BGR (height, width, 3), uint8."""
    blobs = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)


def image_file(path: Path, *arguments: int) -> Path:
    cv2.imwrite(str(path), random_image(*arguments))
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[str, str]:
    """A config and a checkpoint of random weights that predicts several classes."""
    folder = tmp_path_factory.mktemp('model')
    config = str(write_config(folder))
    torch.manual_seed(0)
    model = init_model(config, device='cpu')
    last = model.decode_head.conv_seg
    image = torch.from_numpy(random_image(1, 128, 256)).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        logits = model((image - 110) / 58)
        last.weight.mul_(3 / logits.std((0, 2, 3)).view(-1, 1, 1, 1))
        last.bias.copy_(-3 * logits.mean((0, 2, 3)) / logits.std((0, 2, 3)))
    torch.save(model.state_dict(), folder / 'weights.pth')
    return config, str(folder / 'weights.pth')


@pytest.fixture(scope='module')
def predictor(trained) -> Predictor:
    return Predictor(*trained, device='cpu')


@pytest.fixture(scope='module')
def model(predictor) -> SharedModel:
    return SharedModel(predictor)


@pytest.fixture(scope='module')
def page(model, tmp_path_factory):
    pytest.importorskip('gradio', reason="needs gradio: pip install -e '.[demo]'")
    from mmseg_volo.demo.server import free_port, serve

    examples = [image_file(tmp_path_factory.mktemp('examples') / f'example {i}.png', i) for i in range(2)]
    before, tempfile.tempdir = tempfile.tempdir, str(tmp_path_factory.mktemp('temporary'))
    options = dict(title='a <b>model</b>', about='of the tests', queue=2, examples=examples)
    with serve(model, '127.0.0.1', free_port('127.0.0.1', 0), LIMITS, **options) as page:
        folder = Path(page.blocks.GRADIO_CACHE)
        yield page
        assert folder.is_dir()
    assert not folder.exists() and not page._running
    assert not os.listdir(tempfile.tempdir)
    tempfile.tempdir = before


class Visitor:
    """Sends what the page in a browser sends.

    Args:
        url: address of the page.
        session: its session; a browser makes up a new one for each tab.
    """

    def __init__(self, url: str, session: str = 'visitor'):
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False)
        self.session = session
        self.functions = {f['api_name']: f['id'] for f in self.http.get('config').json()['dependencies']}

    def upload(self, path: Path) -> dict:
        with path.open('rb') as file:
            answer = self.http.post('gradio_api/upload', files={'files': (path.name, file)})
        assert answer.status_code == 200, answer.text
        return {'path': answer.json()[0], 'meta': {'_type': 'gradio.FileData'}}

    def join(self, image: dict | None, multi_scale: bool = False, precision: str | None = 'fp32') -> httpx.Response:
        """Press the button "Predict"."""
        body = dict(data=[image, multi_scale, precision], fn_index=self.functions['_predict'])
        return self.http.post('gradio_api/queue/join', json=dict(body, session_hash=self.session))

    def result(self) -> dict:
        """Follow the queue until the prediction has ended."""
        with self.http.stream('GET', 'gradio_api/queue/data', params=dict(session_hash=self.session)) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix('data: ') or '{}')
                if message.get('msg') == 'process_completed':
                    return message
        raise AssertionError('the stream ended without a result')

    def ask(self, image: Path | dict | None, *options) -> dict:
        """Predict a local file, or one that is on the server."""
        image = self.upload(image) if isinstance(image, Path) else image
        answer = self.join(image, *options)
        assert answer.status_code == 200, answer.text
        return self.result()

    def refusal(self, image: Path | dict | None, *options) -> str:
        """What the visitor reads when there is no prediction."""
        message = self.ask(image, *options)
        assert not message['success'], message
        return message['output']['error']

    def predict(self, image: Path, *options) -> dict:
        """The values of the page's components after a prediction."""
        message = self.ask(image, *options)
        assert message['success'], message
        return dict(
            zip(('slider', 'classes', 'confidence', 'note', 'ids', 'overlay'), message['output']['data'], strict=True)
        )

    def image(self, file: dict) -> np.ndarray:
        """An image that the page shows or gives to download."""
        data = self.http.get(file['url']).raise_for_status().content
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are refused, each with words of the message."""
    image = random_image(3, 64, 96)
    rgb = Image.fromarray(image)
    jpeg = cv2.imencode('.jpg', image)[1].tobytes()
    png = cv2.imencode('.png', image)[1].tobytes()
    moving = io.BytesIO()
    rgb.save(moving, 'GIF', save_all=True, append_images=[rgb.rotate(90)])
    header = png[12:16] + struct.pack('>II', 20000, 20000) + png[24:29]
    bomb = png[:12] + header + struct.pack('>I', zlib.crc32(header)) + png[33:]
    files = {
        'empty.png': (b'', 'The file is empty'),
        'text.png': (b'not an image\n' * 20, 'not an image in a supported format'),
        'drawing.svg': (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', 'not an image'),
        'cut.jpg': (jpeg[: len(jpeg) // 2], 'it is cut off'),
        'cut.png': (png[: len(png) // 2], 'it is cut off'),
        'changed.png': (png[:2000] + bytes([png[2000] ^ 255]) + png[2001:], 'it is damaged'),
        'moving.gif': (moving.getvalue(), 'holds 2 images'),
        'wide.png': (cv2.imencode('.png', np.zeros((1001, 1000), np.uint8))[1].tobytes(), '1000 x 1001 pixels'),
        'bomb.png': (bomb, 'far too many pixels'),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: (folder / name, words) for name, (_, words) in files.items()}
