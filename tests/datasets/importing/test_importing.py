"""Drawn polygons, exported in each format and imported again; what is ambiguous or wrong is counted and named."""

import base64
import json
import shutil
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from drawn_polygons import (
    CLASSES,
    COUNT,
    HEIGHT,
    PALETTE,
    WIDTH,
    coco_content,
    cvat_mask,
    picture,
    pictures,
    polygons_of,
    truth,
    write_coco,
    write_cvat,
    write_label_studio,
    write_labelme,
    write_text,
    write_voc,
    write_yolo,
)
from faulty_data import exif
from PIL import Image

from mmseg_volo.datasets.importing import importer
from mmseg_volo.datasets.importing.importer import Options, import_annotations
from mmseg_volo.errors import DataError

coco_masks = pytest.importorskip('pycocotools.mask', reason='needs pycocotools: pip install -e ".[import]"')
EXPORTED = Path(__file__).parent / 'exported'


def compressed(polygon) -> dict:
    packed = coco_masks.encode(np.asfortranarray(polygon.mask.astype(np.uint8)))
    return dict(size=packed['size'], counts=packed['counts'].decode())


FORMATS = {
    'coco': write_coco,
    'coco, compressed runs': partial(write_coco, segmentation=compressed),
    'labelme': write_labelme,
    'labelme, masks': partial(write_labelme, kind='mask'),
    'voc': write_voc,
    'voc, palette': partial(write_voc, palette_file=True),
    'yolo': write_yolo,
    'cvat': write_cvat,
    'cvat, masks': partial(write_cvat, shape=cvat_mask),
    'label-studio': write_label_studio,
}
COCO_FILE = 'annotations/instances_default.json'
VOC_COLOURS = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]


def run(src: Path, dst: Path, **options) -> importer.Imported:
    return import_annotations(src, dst, Options(workers=1, **options))


def label_of(dst: Path, index: int) -> np.ndarray:
    (path,) = dst.glob(f'labels/*/{index}.png')
    image = Image.open(path)
    assert image.mode == 'L'
    return np.array(image)


def check_labels(dst: Path, classes: list[str], count: int = COUNT) -> None:
    """Each class of each image has 0.99 IoU with the drawn one."""
    ids = {name: index for index, name in enumerate(classes)}
    for index in range(count):
        label, expected = label_of(dst, index), truth(polygons_of(index), ids)
        for value in range(len(classes)):
            found, drawn = label == value, expected == value
            assert (found & drawn).sum() >= 0.99 * (found | drawn).sum(), (index, classes[value])


@pytest.mark.parametrize('name', FORMATS)
def test_drawn_polygons_come_back(tmp_path, name, capsys):
    src, dst = FORMATS[name](tmp_path / 'src'), tmp_path / 'dst'
    found = run(src, dst, classes=CLASSES)
    assert found.classes == ['background', *CLASSES]
    keeps_colours = name.split(',')[0] in ('voc', 'cvat')
    assert found.palette == ([(0, 0, 0), *PALETTE] if keeps_colours else VOC_COLOURS)
    check_labels(dst, found.classes)
    assert f'format: {name.split(",")[0]}\n' in capsys.readouterr().out
    images = {path.name: path for path in dst.glob('images/*/*')}
    for path in src.rglob('*.jpg'):
        assert images[path.name].samefile(path)  # a hard link
    if name.startswith(('voc', 'yolo')):
        assert sorted(path.name for path in (dst / 'images/val').iterdir()) == ['3.jpg', '4.jpg']
    assert {path.name for path in tmp_path.iterdir()} == {'src', 'dst'}


@pytest.mark.parametrize('name', sorted(path.name for path in EXPORTED.iterdir() if path.is_dir()))
def test_exports_of_the_formats_own_libraries(tmp_path, name):
    """The files were written by Datumaro, label-studio-converter and labelme; see exported/make.py."""
    shutil.copytree(EXPORTED / name, tmp_path / 'src')
    pictures(tmp_path / 'images', count=2)
    found = run(tmp_path / 'src', tmp_path / 'dst', images=[str(tmp_path / 'images')], classes=CLASSES)
    check_labels(tmp_path / 'dst', found.classes, count=2)
    if name.startswith(('coco', 'cvat', 'voc')):
        assert (tmp_path / 'dst/images/val/1.jpg').is_file() and (tmp_path / 'dst/images/train/0.jpg').is_file()


def test_the_shapes_of_the_tools(tmp_path):
    """Rectangles, circles and ellipses, turned ones too, in the formats that have them."""
    size = dict(original_width=100, original_height=50)
    picture(tmp_path / 'cvat/0.png', 0)
    picture(tmp_path / 'cvat/1.png', 1)
    box = '<box label="a" xtl="10" ytl="20" xbr="50" ybr="40" rotation="90"></box>'
    oval = '<ellipse label="a" cx="300" cy="200" rx="50" ry="20"></ellipse><points label="a" points="1,2"></points>'
    images = f'<image name="0.png" width="{WIDTH}" height="{HEIGHT}">{box}{oval}</image>'
    write_text(tmp_path / 'cvat/a.xml', f'<annotations>{images}{images.replace("0.png", "1.png")}</annotations>')
    run(tmp_path / 'cvat', tmp_path / 'one')
    label = label_of(tmp_path / 'one', 0)
    assert label[10:50, 20:40].all() and label[:, :100].sum() == 800
    assert label[:, 100:].sum() == pytest.approx(np.pi * 50 * 20, rel=0.01)
    text = (tmp_path / 'one/import.txt').read_text()
    assert 'note: shapes without an area, left out: points (2)\n  0.png\n  1.png' in text

    for index in range(2):
        Image.new('RGB', (100, 50)).save(tmp_path / 'cvat' / f'{index}.png')
    (tmp_path / 'cvat/a.xml').unlink()
    turned = dict(x=50, y=20, width=20, height=60, rotation=90, rectanglelabels=['a'])
    regions = [dict(type='rectanglelabels', id='r', value=turned, **size)]
    tasks = [
        dict(data=dict(image=f'/data/local-files/?d=x/{i}.png'), annotations=[dict(result=regions)]) for i in range(2)
    ]
    write_text(tmp_path / 'cvat/a.json', json.dumps(tasks))
    run(tmp_path / 'cvat', tmp_path / 'two')
    label = label_of(tmp_path / 'two', 0)
    assert label[10:30, 20:50].all() and label.sum() == 600

    (tmp_path / 'cvat/a.json').unlink()
    shapes = [
        dict(label='a', shape_type='circle', points=[[30, 25], [30, 35]]),
        dict(label='a', shape_type='rectangle', points=[[60, 40], [80, 20]]),
        dict(label='b', shape_type='line', points=[[60, 40], [80, 20]]),
    ]
    for index in range(2):
        content = dict(shapes=shapes, imagePath=f'{index}.png', imageData=None, imageHeight=50, imageWidth=100)
        write_text(tmp_path / f'cvat/{index}.json', json.dumps(content))
    run(tmp_path / 'cvat', tmp_path / 'three')
    label = label_of(tmp_path / 'three', 0)
    assert label[20:40, 60:80].all() and label[:, :50].sum() == pytest.approx(np.pi * 100, rel=0.03)


def test_classes_are_chosen_and_ordered(tmp_path, capsys):
    src = write_coco(tmp_path / 'src')
    found = run(src, tmp_path / 'all')
    assert found.classes == ['background', *CLASSES]
    found = run(src, tmp_path / 'some', classes=['weed', 'background'])
    assert found.classes == ['weed', 'background'] and found.palette == [(128, 0, 0), (0, 0, 0)]
    expected = truth(polygons_of(0), dict(soil=1, crop=1, weed=0), uncovered=1)
    assert (label_of(tmp_path / 'some', 0) != expected).mean() < 0.002
    assert 'note: classes that are not in --classes and become background (2): soil, crop' in capsys.readouterr().out
    found = run(src, tmp_path / 'ignored', ignore=['crop'], ignore_background=True)
    assert found.classes == ['soil', 'weed']
    expected = truth(polygons_of(0), dict(soil=0, crop=255, weed=1), uncovered=255)
    assert (label_of(tmp_path / 'ignored', 0) != expected).mean() < 0.002
    with pytest.raises(DataError, match=r"no class 'sil'; did you mean 'soil'\?"):
        run(src, tmp_path / 'unknown', classes=['sil'])


def test_too_many_classes(tmp_path):
    src = write_coco(tmp_path / 'src')
    file = src / 'annotations/instances_default.json'
    content = json.loads(file.read_text())
    content['categories'] += [dict(id=100 + i, name=f'class{i}') for i in range(251)]
    file.write_text(json.dumps(content))
    assert len(run(src, tmp_path / 'dst').classes) == 255
    content['categories'].append(dict(id=999, name='one more'))
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match='256 classes, but a label has room for 255'):
        run(src, tmp_path / 'more')


def test_overlaps_are_counted_and_small_shapes_can_be_on_top(tmp_path, capsys):
    src = write_coco(tmp_path / 'src')
    file = src / 'annotations/instances_default.json'
    content = json.loads(file.read_text())
    content['annotations'].reverse()  # soil, the largest, comes last
    file.write_text(json.dumps(content))
    run(src, tmp_path / 'file')
    assert (label_of(tmp_path / 'file', 0) == 1).sum() == pytest.approx(polygons_of(0)[0].mask.sum(), rel=0.01)
    masks = [polygon.mask for polygon in polygons_of(0)]
    twice = 100 * (sum(mask.astype(int) for mask in masks) > 1).mean()
    assert f'the last drawn counts (5): 0.jpg {twice:.1f} %' in capsys.readouterr().out
    run(src, tmp_path / 'size', small_on_top=True)
    check_labels(tmp_path / 'size', ['background', *CLASSES])


def test_splits(tmp_path, capsys):
    src = write_coco(tmp_path / 'src')
    run(src, tmp_path / 'drawn', val=0.4)
    assert len(list((tmp_path / 'drawn/images/val').iterdir())) == 2
    assert 'no validation split: 2 of 5 images were chosen' in capsys.readouterr().out
    run(src, tmp_path / 'named', val_names=['[12].*'])
    assert sorted(path.name for path in (tmp_path / 'named/labels/val').iterdir()) == ['1.png', '2.png']
    with pytest.raises(DataError, match='no image for val'):
        run(src, tmp_path / 'none', val_names=['x*'])
    assert not (tmp_path / 'none').exists()
    for split, names in (('train', ['0.jpg', '1.jpg']), ('valid', ['0.jpg']), ('test', ['0.jpg'])):  # as Roboflow
        pictures(tmp_path / 'robo' / split, count=len(names))
        write_text(tmp_path / f'robo/{split}/_annotations.coco.json', json.dumps(coco_content(names)))
    run(tmp_path / 'robo', tmp_path / 'robo_out')
    found = sorted(path.relative_to(tmp_path / 'robo_out').as_posix() for path in tmp_path.glob('robo_out/images/*/*'))
    assert found == ['images/test/0.jpg', 'images/train/0.jpg', 'images/train/1.jpg', 'images/val/0.jpg']


def test_images_without_annotation(tmp_path, capsys):
    src = write_coco(tmp_path / 'src')
    file = src / 'annotations/instances_default.json'
    content = json.loads(file.read_text())
    content['annotations'] = [each for each in content['annotations'] if each['image_id'] != 7]  # 0.jpg
    content['images'].append(dict(id=1, file_name='gone.jpg', width=1, height=1))
    file.write_text(json.dumps(content))
    picture(src / 'images/new.jpg', 9)
    run(src, tmp_path / 'default')
    out = capsys.readouterr().out
    assert 'images without a shape, all background (1): 0.jpg' in out
    assert 'images without an annotation, left out (1): images/new.jpg' in out
    assert 'annotated images that do not exist, left out (1): gone.jpg' in out
    assert not label_of(tmp_path / 'default', 0).any() and not list(tmp_path.glob('default/*/*/new.*'))
    run(src, tmp_path / 'skip', empty='skip')
    assert len(list(tmp_path.glob('skip/labels/*/*'))) == 4
    run(src, tmp_path / 'background', empty='background')
    assert len(list(tmp_path.glob('background/labels/*/*'))) == 6
    shutil.rmtree(src / 'images')
    with pytest.raises(DataError, match=r'none of the 6 annotated images exists, such as 0.jpg; give .* --images'):
        run(src, tmp_path / 'none')


def test_unknown_colours_are_faults(tmp_path, capsys):
    src, dst = write_voc(tmp_path / 'src'), tmp_path / 'dst'
    path = src / 'SegmentationClass/1.png'
    mask = np.array(Image.open(path))
    mask[:2, :10] = 1, 2, 3
    mask[5, :7] = 224, 224, 192  # void
    Image.fromarray(mask).save(path)
    with pytest.raises(DataError, match=r'1 of 5 images have a fault, and nothing was written'):
        run(src, dst)
    assert '1.png: colours of no class: (1, 2, 3) (20 pixels); add them to labelmap.txt' in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {'src'}
    run(src, dst, keep_going=True)
    assert len(list(dst.glob('labels/*/*'))) == len(list(dst.glob('images/*/*'))) == 4
    mask[:2, :10] = 0
    Image.fromarray(mask).save(path)
    run(src, tmp_path / 'void')
    assert (label_of(tmp_path / 'void', 1)[5, :8] == [255] * 7 + [0]).all()


def test_a_damaged_file_of_many_is_named_and_can_be_left_out(tmp_path, capsys):
    src = write_labelme(tmp_path / 'src')
    (src / '1.json').write_text((src / '1.json').read_text()[:500])
    (src / '3.json').write_text((src / '3.json').read_text().replace('"points"', '"dots"'))
    with pytest.raises(DataError, match='2 of 5 images have a fault'):
        run(src, tmp_path / 'dst')
    out = capsys.readouterr().out
    assert "3.json: not a readable LabelMe file (no 'points')" in out and '1.json: not a readable JSON file' in out
    run(src, tmp_path / 'dst', keep_going=True)
    assert len(list(tmp_path.glob('dst/labels/*/*'))) == 3


def test_without_pycocotools_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importer.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(DataError, match=r'pycocotools is needed to draw shapes: pip install pycocotools'):
        run(write_coco(tmp_path / 'src'), tmp_path / 'dst')
    run(write_voc(tmp_path / 'voc'), tmp_path / 'dst')


def test_images_of_another_size_and_damaged_ones_are_faults(tmp_path, capsys):
    src = write_labelme(tmp_path / 'src')
    Image.new('RGB', (WIDTH // 2, HEIGHT)).save(src / '0.jpg')
    (src / '1.jpg').write_bytes((src / '1.jpg').read_bytes()[:999])
    with pytest.raises(DataError, match='2 of 5 images have a fault'):
        run(src, tmp_path / 'dst')
    out = capsys.readouterr().out
    assert f'0.json: the annotation is for {WIDTH} x {HEIGHT} pixels, the image has {WIDTH // 2} x {HEIGHT}' in out
    assert '1.jpg: it is cut off' in out


@pytest.mark.parametrize('orientation', range(2, 9))
def test_images_that_exif_turns(tmp_path, orientation, capsys):
    """The label fits the image as it is loaded, whether the annotation was drawn before or after turning."""
    src = write_labelme(tmp_path / 'src')
    picture(src / '0.jpg', 0, exif=exif(orientation))
    content = json.loads((src / '0.json').read_text())
    run(src, tmp_path / 'stored')
    out = capsys.readouterr().out
    label = label_of(tmp_path / 'stored', 0)
    expected = truth(polygons_of(0), dict(crop=1, soil=2, weed=3))
    if orientation < 5:
        assert 'annotation that may be for either side: look at them (1): 0.json' in out
        assert (label != expected).mean() < 0.002
        return
    assert 'the label is turned too (1): 0.json' in out
    upright = np.array(turned_upright(Image.fromarray(expected), orientation))
    assert label.shape == cv2.imread(str(src / '0.jpg')).shape[:2] and (label != upright).mean() < 0.002
    content.update(imageHeight=WIDTH, imageWidth=HEIGHT)  # drawn on the turned image
    (src / '0.json').write_text(json.dumps(content))
    run(src, tmp_path / 'upright')
    assert label_of(tmp_path / 'upright', 0).shape == (WIDTH, HEIGHT)


def turned_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Pillow's way to turn an image upright."""
    method = {5: 'TRANSPOSE', 6: 'ROTATE_270', 7: 'TRANSVERSE', 8: 'ROTATE_90'}[orientation]
    return image.transpose(Image.Transpose[method])


def test_names(tmp_path):
    """Two images of one name in one place are a fault; in several folders they stay apart or must be named."""
    src = write_labelme(tmp_path / 'a/scene1')
    write_labelme(tmp_path / 'a/scene2')
    run(tmp_path / 'a', tmp_path / 'apart', val_names=['scene2/*'])
    assert (tmp_path / 'apart/labels/train/scene1/0.png').is_file()
    assert (tmp_path / 'apart/labels/val/scene2/0.png').is_file()
    picture(src / '0.png', 0)
    content = json.loads((src / '0.json').read_text())
    write_text(src / 'more.json', json.dumps(dict(content, imagePath='0.png')))
    with pytest.raises(DataError, match=r'images of one name: scene1/more.json and scene1/0.json'):
        run(tmp_path / 'a', tmp_path / 'twice')
    write_text(tmp_path / 'b/c.json', json.dumps(coco_content(['0.jpg'])))
    for scene in ('x', 'y'):
        pictures(tmp_path / 'b' / scene, count=1)
    with pytest.raises(DataError, match=r'0.jpg: 2 images have this name, such as .*x/0.jpg and .*y/0.jpg'):
        run(tmp_path / 'b', tmp_path / 'which')


def test_images_inside_of_labelme_files(tmp_path):
    src = write_labelme(tmp_path / 'src')
    content = json.loads((src / '0.json').read_text())
    data = (src / '0.jpg').read_bytes()
    (src / '0.json').write_text(json.dumps(dict(content, imageData=base64.b64encode(data).decode())))
    (src / '0.jpg').unlink()
    found = run(src, tmp_path / 'dst')
    check_labels(tmp_path / 'dst', found.classes)
    (path,) = tmp_path.glob('dst/images/*/0.jpg')
    assert path.read_bytes() == data


def test_suffixes_become_usual_ones(tmp_path):
    src = write_labelme(tmp_path / 'src')
    for index, suffix in enumerate(('.JPG', '.jpeg', '.JPEG')):
        (src / f'{index}.jpg').rename(src / f'{index}{suffix}')
        file = src / f'{index}.json'
        file.write_text(file.read_text().replace(f'{index}.jpg', f'{index}{suffix}'))
    run(src, tmp_path / 'dst')
    assert {path.suffix for path in tmp_path.glob('dst/images/*/*')} == {'.jpg'}


def broken_yolo(line: str):
    def spoil(root: Path) -> None:
        write_text(write_yolo(root) / 'labels/train/0.txt', line)

    return spoil


def spoiled(write, file: str, text: str):
    return lambda root: write_text(write(root) / file, text)


def broken_coco(root: Path) -> None:
    file = write_coco(root) / 'annotations/instances_default.json'
    content = json.loads(file.read_text())
    content['annotations'][4]['category_id'] = 77
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    'write, message',
    [
        (lambda root: None, 'no such file or folder'),
        (lambda root: root.mkdir(), 'no annotations; expected a JSON file of COCO'),
        (broken_coco, '1.jpg: its category_id 77 is none of the categories'),
        (spoiled(write_coco, COCO_FILE, '{"categories": [}'), 'not a readable JSON file'),
        (spoiled(write_coco, COCO_FILE, '{"categories": []}'), "COCO file .no 'annotations'"),
        (spoiled(write_labelme, '0.json', '{"shapes": [{"points": []}]}'), "not a readable LabelMe file .no 'label'"),
        (spoiled(write_cvat, 'annotations.xml', '<annotations><image'), 'not a readable XML file'),
        (spoiled(write_cvat, 'annotations.xml', '<annotations><track/></annotations>'), 'export .* for images 1.1'),
        (spoiled(write_voc, 'labelmap.txt', 'car:1,2\n'), 'labelmap.txt, line 1: expected NAME:R,G,B'),
        (spoiled(write_yolo, 'data.yaml', 'names: [a]\ntrain: nowhere\n'), "train is 'nowhere', but .* does not exist"),
        (broken_yolo('7 0.1 0.1 0.2 0.2 0.1 0.2\n'), '0.jpg: line 1 has class id 7, but there are 3 classes'),
        (broken_yolo('0 0.1 0.1 0.2 x 0.1 0.2\n'), 'line 1 is not a class id and three or more points'),
        (broken_yolo('0 0.1 0.1 90 0.2 0.1 0.2\n'), 'coordinates are far outside of the image'),
        (spoiled(write_yolo, 'data.yaml', 'names: [a\ntrain: x\n'), 'data.yaml: not a readable YAML file'),
        (spoiled(write_yolo, 'data.yaml', 'names: {a: b}\n'), 'data.yaml: not a readable YAML file .invalid literal'),
        (spoiled(write_label_studio, 'project-1.json', '[{"annotations": 3}]'), 'not a readable Label Studio file'),
        (spoiled(write_label_studio, 'project-1.json', '[{"annotations": [], "data": {}}]'), 'task without an image'),
        (spoiled(write_coco, 'more.xml', '<annotations></annotations>'), 'several formats .coco, cvat.'),
    ],
)  # fmt: skip
def test_bad_sources_are_one_line(tmp_path, write, message, capsys):
    write(tmp_path / 'src')
    with pytest.raises(DataError, match=message) as error:
        run(tmp_path / 'src', tmp_path / 'dst')
    assert '\n' not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {'src'}


@pytest.mark.parametrize('stated', ['classes.txt', '--classes'])
def test_yolo_without_a_yaml_file(tmp_path, stated):
    src = write_yolo(tmp_path / 'src')
    (src / 'data.yaml').unlink()
    (src / 'labels/train/0.txt').unlink()
    if stated == 'classes.txt':
        write_text(src / 'classes.txt', '\n'.join(CLASSES))
    else:
        with pytest.raises(DataError, match='give them in the order of their ids: --classes'):
            run(src, tmp_path / 'dst')
    found = run(src, tmp_path / 'dst', classes=() if stated == 'classes.txt' else CLASSES)
    assert found.classes == ['background', *CLASSES]
    assert len(list(tmp_path.glob('dst/labels/train/*'))) == len(list(tmp_path.glob('dst/labels/val/*'))) == 2


def test_label_studio_tasks(tmp_path, capsys):
    """Brush and label in two results; of several annotations the ground truth; cancelled ones do not count."""

    def region(polygon) -> dict:
        return dict(type='brush', value=json.loads(brushes[polygon.label]))

    exported = json.loads((EXPORTED / 'label_studio/project-1.json').read_text())[0]['annotations'][0]['result']
    brushes = {each['value']['brushlabels'].pop(): json.dumps(each['value']) for each in exported}
    src = write_label_studio(tmp_path / 'src', region, count=4)
    tasks = json.loads((src / 'project-1.json').read_text())
    for task in tasks:
        (annotation,) = task['annotations']
        named = [dict(each, type='labels') for each in annotation['result']]
        named = [dict(each, value=dict(labels=[label])) for each, label in zip(named, CLASSES, strict=True)]
        annotation['result'] += [*named, dict(id='k', type='keypointlabels', value=dict(x=1, y=1, width=0.1))]
        other = dict(id=99, result=[], was_cancelled=False)
        task['annotations'] = [other, dict(annotation, ground_truth=True)]
    tasks[2]['annotations'] = [dict(id=98, result=exported, was_cancelled=True)]
    tasks[3]['annotations'] = []
    (src / 'project-1.json').write_text(json.dumps(tasks))
    found = run(src, tmp_path / 'dst', classes=CLASSES)
    assert found.classes == ['background', *CLASSES]
    label = label_of(tmp_path / 'dst', 0)
    np.testing.assert_array_equal(label, truth(polygons_of(0), dict(soil=1, crop=2, weed=3)))
    out = capsys.readouterr().out
    assert 'tasks with several annotations, of which one is used (2): 0.jpg, 1.jpg' in out
    assert 'images without an annotation, left out (2): 2.jpg, 3.jpg' in out
    assert 'regions without an area, left out: keypointlabels (2)' in out


def test_coco_files_of_several_kinds(tmp_path, capsys):
    """Polygons of several parts, boxes without polygons, ids without an image; files of captions and key points."""
    src = write_coco(tmp_path / 'src')
    file = src / COCO_FILE
    content = json.loads(file.read_text())
    first = content['annotations'][0]
    first['segmentation'] = [[0, 0, 10, 0, 10, 10, 0, 10], [20, 20, 30, 20, 30, 30, 20, 30], [5, 5, 6, 6]]
    content['annotations'][1]['segmentation'] = []
    content['annotations'] = content['annotations'][:2] + content['annotations'][3:]
    content['annotations'].append(dict(first, image_id=99))
    file.write_text(json.dumps(content))
    write_text(src / 'annotations/person_keypoints.json', json.dumps(content))
    write_text(src / 'annotations/captions.json', json.dumps(dict(images=[dict(file_name='0.jpg')], annotations=[])))
    run(src, tmp_path / 'dst')
    label = label_of(tmp_path / 'dst', 0)
    assert label[:10, :10].all() and label[20:30, 20:30].all() and label.sum() == 200
    out = capsys.readouterr().out
    assert 'boxes, and polygons of fewer than 3 corners, left out (2): 0.jpg, 0.jpg' in out
    assert 'image ids that only annotations have (1): instances_default.json: 99' in out
    assert 'files beside those named instances*, left out (2)' in out


def test_labelme_lists_classes_and_ignores(tmp_path):
    src = write_labelme(tmp_path / 'src')
    for path in src.glob('*.json'):
        path.write_text(path.read_text().replace('"crop"', '"__ignore__"').replace('"weed"', '"_background_"'))
    write_text(src / 'labels.txt', '__ignore__\n_background_\nstone\nsoil\n')
    found = run(src, tmp_path / 'dst')
    assert found.classes == ['background', 'stone', 'soil']
    expected = truth(polygons_of(0), dict(soil=2, crop=255, weed=0))
    assert (label_of(tmp_path / 'dst', 0) != expected).mean() < 0.002


def test_a_destination_in_use_stays_as_it_is(tmp_path):
    src = write_coco(tmp_path / 'src')
    (tmp_path / 'empty').mkdir()
    run(src, tmp_path / 'empty')
    assert (tmp_path / 'empty/labels/train').is_dir()
    write_text(tmp_path / 'dst/mine.txt', 'mine')
    with pytest.raises(DataError, match='exists and is not empty; nothing was changed'):
        run(src, tmp_path / 'dst')
    assert (tmp_path / 'dst/mine.txt').read_text() == 'mine'


def test_boxes_of_detectors_are_no_masks(tmp_path):
    src = write_yolo(tmp_path / 'src')
    for path in src.rglob('labels/*/*.txt'):
        path.write_text('1 0.5 0.5 0.2 0.2\n')
    with pytest.raises(DataError, match=r'no image has a shape with an area; boxes, left out \(5\): 0.txt, line 1'):
        run(src, tmp_path / 'dst')


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(item, plan):
        if item.where.startswith('3'):
            raise KeyboardInterrupt
        return original(item, plan)

    original = importer.draw
    monkeypatch.setattr(importer, 'draw', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(write_coco(tmp_path / 'src'), tmp_path / 'dst')
    assert {path.name for path in tmp_path.iterdir()} == {'src'}


def test_processes_give_the_same_labels(tmp_path):
    src = write_coco(tmp_path / 'src')
    run(src, tmp_path / 'one')
    import_annotations(src, tmp_path / 'two', Options(workers=2))
    names = sorted(path.relative_to(tmp_path / 'one') for path in tmp_path.glob('one/labels/*/*'))
    assert len(names) == COUNT
    for name in names:
        assert (tmp_path / 'one' / name).read_bytes() == (tmp_path / 'two' / name).read_bytes()
