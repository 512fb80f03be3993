"""The page of a tiny model behind a running server, and files for it: what the tests of the demo share."""

import io
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import write_config

from mmseg_volo.datasets.street_drawing import draw_scene
from mmseg_volo.demo.model import SharedModel
from mmseg_volo.demo.uploads import Limits
from mmseg_volo.inference import Predictor
from mmseg_volo.inference.model import init_model

LIMITS = Limits(megapixels=1, megabytes=1)


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> tuple[str, str]:
    """A config and a checkpoint of random weights in whose predictions several classes occur."""
    folder = tmp_path_factory.mktemp('model')
    config = str(write_config(folder))
    torch.manual_seed(0)
    model = init_model(config, device='cpu')
    last = model.decode_head.conv_seg
    picture = torch.from_numpy(draw_scene(1, (128, 256))[0]).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        logits = model((picture - 110) / 58)
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
def server(model):
    pytest.importorskip('gradio', reason="needs gradio: pip install -e '.[demo]'")
    from mmseg_volo.demo.server import DemoServer, bind

    server = DemoServer(bind('127.0.0.1', 0), model, 'a <b>model</b>', 'of the tests', LIMITS, queue=2)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server
    assert server.folder.is_dir()
    server.stop()
    thread.join(20)
    assert not thread.is_alive() and not server.folder.exists()


def picture_file(folder: Path, seed: int = 0, size: tuple[int, int] = (96, 160), name: str = '') -> Path:
    path = folder / (name or f'street {seed}.png')
    cv2.imwrite(str(path), draw_scene(seed, size)[0])
    return path


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    image = draw_scene(3, (64, 96))[0]
    rgb = Image.fromarray(image)
    jpeg = cv2.imencode('.jpg', image)[1].tobytes()
    png = cv2.imencode('.png', image)[1].tobytes()
    moving = io.BytesIO()
    rgb.save(moving, 'GIF', save_all=True, append_images=[rgb.rotate(90)])
    bomb = io.BytesIO()
    Image.new('1', (20000, 20000)).save(bomb, 'PNG')
    files = {
        'empty.png': (b'', 'The file is empty'),
        'text.png': (b'not a picture\n' * 20, 'not a picture of a kind that is read'),
        'cut.jpg': (jpeg[: len(jpeg) // 2], 'broken: it is cut off'),
        'cut.png': (png[: len(png) // 2], 'broken: it is cut off'),
        'changed.png': (png[:2000] + bytes([png[2000] ^ 255]) + png[2001:], 'broken: it is damaged'),
        'one.png': (cv2.imencode('.png', image[:1, :1])[1].tobytes(), 'The picture has 1 x 1 pixels'),
        'moving.gif': (moving.getvalue(), 'holds 2 pictures'),
        'wide.png': (cv2.imencode('.png', np.zeros((1001, 1000), np.uint8))[1].tobytes(), '1000 x 1001 pixels'),
        'bomb.png': (bomb.getvalue(), 'far too many pixels'),
        'heavy.png': (png + bytes(2**20), 'at most 1 MB'),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {name: (folder / name, words) for name, (_, words) in files.items()}
