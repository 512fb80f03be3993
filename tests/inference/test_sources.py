"""Files, folders, links and glob patterns, and the names of their results."""

import os
from pathlib import Path

import pytest

from mmseg_volo.inference.sources import find_images, find_sources


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b'')
    return folder


def names(folder: Path, *sources: str, **more) -> list[str]:
    """The images found, as paths below ``folder``."""
    found = find_sources([str(folder / source) for source in sources], **more)[0]
    return [os.path.relpath(path, folder) for path in found]


def test_files_folders_and_patterns_are_found(tmp_path, capsys):
    touch(tmp_path, 'both/a.png', 'both/a.mp4', 'both/deep/b.MOV', 'films/a.mp4', 'films/a.mkv', 'films/deep/b.webm')

    def found(*sources: str, **more):
        return [
            {str(k.relative_to(tmp_path)): str(v) for k, v in kind.items()}
            for kind in find_sources([f'{tmp_path}/{s}' for s in sources], **more)
        ]

    assert found('both') == [{'both/a.png': 'a'}, {}]
    assert f'{tmp_path}/both: skipped 2 videos beside the images' in capsys.readouterr().err
    assert found('films') == [{}, {'films/a.mp4': 'a.mp4', 'films/a.mkv': 'a.mkv', 'films/deep/b.webm': 'deep/b'}]
    assert found('both/*') == [{'both/a.png': 'a'}, {'both/a.mp4': 'a'}]
    assert found('both/deep/b.MOV') == [{}, {'both/deep/b.MOV': 'b'}]
    assert found('both', out_dir=f'{tmp_path}/both/deep')[0] == {'both/a.png': 'a'}
    assert capsys.readouterr().err.count('skipped') == 1  # results of an earlier run are not sources
    with pytest.raises(FileNotFoundError, match='no image found, only videos'):
        find_images([f'{tmp_path}/films'])


def test_find_images_keeps_names_apart(tmp_path):
    touch(tmp_path, 'a.png', 'a.jpg', 'b.png', 'notes.txt', 'deep/a.png')
    found = {str(k.relative_to(tmp_path)): str(v) for k, v in find_images([str(tmp_path)]).items()}
    assert found == {'a.png': 'a.png', 'a.jpg': 'a.jpg', 'b.png': 'b', 'deep/a.png': 'deep/a'}
    with pytest.raises(FileExistsError, match='would have the same name in the output folder'):
        find_images([str(tmp_path / 'a.png'), str(tmp_path / 'deep/a.png')])


def test_hidden_files_and_folders_are_no_part_of_a_folder(tmp_path):
    hidden = 'in/._a.jpg', 'in/.ipynb_checkpoints/a-checkpoint.jpg', 'in/deep/.cache/b.jpg', 'in/deep/._b.jpg'
    touch(tmp_path / '.hidden', 'in/a.jpg', 'in/deep/b.jpg', *hidden)
    visible = ['.hidden/in/a.jpg', '.hidden/in/deep/b.jpg']
    assert names(tmp_path, '.hidden/in') == visible  # what is named itself may be hidden
    assert names(tmp_path, '.hidden/in/**/*.jpg') == visible
    assert names(tmp_path, '.hidden/in/*') == visible[:1]
    assert names(tmp_path, '.hidden/in/._a.jpg', '.hidden/in/.ipynb_checkpoints') == list(hidden_paths(hidden[:2]))
    with pytest.raises(FileNotFoundError, match='no image found'):
        names(touch(tmp_path, 'only/._a.jpg'), 'only')


def hidden_paths(paths):
    return (f'.hidden/{path}' for path in paths)


def test_suffixes_count_in_upper_case_and_those_of_the_config(tmp_path):
    touch(tmp_path, 'a.JPG', 'b.Tif', 'c.PNG', 'd.npy', 'e.txt')
    assert names(tmp_path, '.') == ['a.JPG', 'b.Tif', 'c.PNG']
    assert names(tmp_path, '*', suffixes=['.npy']) == ['a.JPG', 'b.Tif', 'c.PNG', 'd.npy']


def test_linked_folders_are_followed_once_and_loops_end(tmp_path, capsys):
    touch(tmp_path, 'in/day1/a.png', 'disk/day2/b.png', 'disk/day2/more/c.png')
    (tmp_path / 'in/day2').symlink_to(tmp_path / 'disk/day2')
    (tmp_path / 'in/again').symlink_to(tmp_path / 'disk/day2')
    (tmp_path / 'in/part').symlink_to(tmp_path / 'disk/day2/more')
    (tmp_path / 'in/a_link').symlink_to('day1')  # before day1 in the alphabet
    (tmp_path / 'in/day1/loop').symlink_to(tmp_path / 'in')
    (tmp_path / 'disk/day2/self').symlink_to('.')
    (tmp_path / 'in/linked.png').symlink_to('day1/a.png')
    (tmp_path / 'in/nowhere').symlink_to(tmp_path / 'gone')
    (tmp_path / 'in/gone.png').symlink_to(tmp_path / 'gone.png')
    found = names(tmp_path, 'in')
    assert found == ['in/again/b.png', 'in/again/more/c.png', 'in/day1/a.png', 'in/gone.png', 'in/linked.png']
    told = capsys.readouterr().err
    for name in ('in/day2', 'in/part', 'in/a_link', 'in/day1/loop'):
        assert f'{tmp_path}/{name}: skipped, the folder that it links to was read before' in told
    assert found == names(tmp_path, 'in', out_dir=str(tmp_path / 'in/out'))
    assert len(names(tmp_path, 'in', out_dir=str(tmp_path / 'disk'))) == 3  # results are no sources through links


def test_a_file_that_is_reached_twice_is_predicted_once_under_each_name(tmp_path):
    touch(tmp_path, 'in/a.png')
    (tmp_path / 'link').symlink_to('in')
    assert names(tmp_path, 'in', 'link', 'in/../in/a.png', 'in/a.png') == ['in/a.png']
    touch(tmp_path, 'other/a.png')
    with pytest.raises(FileExistsError, match='would have the same name in the output folder'):
        names(tmp_path, 'in', 'other')


def test_brackets_are_a_pattern_only_where_no_such_file_exists(tmp_path):
    touch(tmp_path, 'scan[1]/a[2].png', 'scan[1]/a2.png', 'scan1/b.png', 'all*/c.png')
    assert names(tmp_path, 'scan[1]/a[2].png') == ['scan[1]/a[2].png']
    assert names(tmp_path, 'scan[1]') == ['scan[1]/a2.png', 'scan[1]/a[2].png']
    assert names(tmp_path, 'scan[1]/*.png') == ['scan[1]/a2.png', 'scan[1]/a[2].png']
    assert names(tmp_path, 'scan[1]/a[1-3].png') == ['scan[1]/a2.png']
    assert names(tmp_path, 'scan[0-9]/*.png') == ['scan1/b.png']
    assert names(tmp_path, 'all*') == ['all*/c.png']
    assert names(tmp_path, '**/b.png') == ['scan1/b.png']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every folder')
def test_a_folder_that_cannot_be_read_is_named(tmp_path, capsys):
    touch(tmp_path, 'a.png', 'closed/b.png')
    (tmp_path / 'closed').chmod(0)
    try:
        assert names(tmp_path, '.') == ['a.png']
    finally:
        (tmp_path / 'closed').chmod(0o700)
    assert 'closed: skipped, the folder cannot be read (Permission denied)' in capsys.readouterr().err
