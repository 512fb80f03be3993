"""The folder with visitors' files."""

import os
import time

from mmseg_volo.demo.store import Store


def test_the_store_keeps_its_size(tmp_path):
    def write(name: str, size: int, age: float) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
        os.utime(tmp_path / name, (time.time() - age,) * 2)

    write('examples/1.png', 50 * 2**20, 9000)
    store = Store(tmp_path, megabytes=1)  # keeps 100 MB
    for i in range(6):
        write(f'{i}/image.png', 30 * 2**20, 1000 * (i + 1))
    write('tmpcut', 10, 3600)  # what an interrupted upload leaves, and one that goes on
    write('tmpnow', 10, 1)
    store.make_room()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*') if path.is_file()}
    assert left == {'examples/1.png', '0/image.png', '1/image.png', '2/image.png', 'tmpnow'}
