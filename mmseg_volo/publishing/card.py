"""The papers of a published model: a model card in the Hugging Face hub's format, and OpenMMLab's metafile.

They say what the files say and nothing else: what is not recorded is said not to be.
"""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .records import Measurement, dataset_name
from .settings import is_public, last_part

_TITLE = 'VOLO: Vision Outlooker for Visual Recognition'
_PAPER = 'https://arxiv.org/abs/2106.13112'
_HEADS = {'LeanUPerHead': 'UPerNet', 'UPerHead': 'UPerNet', 'LeanFCNHead': 'FCN', 'FCNHead': 'FCN'}
_PRECISIONS = {'BFloat16OptimWrapper': 'bfloat16', 'AmpOptimWrapper': 'float16 with loss scaling'}
_RANDOM = 'random weights'
_CITATION = """```bibtex
@article{yuan2022volo,
  title={VOLO: Vision Outlooker for Visual Recognition},
  author={Yuan, Li and Hou, Qibin and Jiang, Zihang and Feng, Jiashi and Yan, Shuicheng},
  journal={IEEE Transactions on Pattern Analysis and Machine Intelligence},
  year={2022}
}
```"""


@dataclass
class Facts:
    """What the papers are made of."""

    name: str
    weights: str  # name of the .pth file
    safetensors: str
    config: dict  # as published
    trained: dict  # as it was trained, for what the published one no longer says
    meta: dict  # of the checkpoint
    checkpoint: str  # its name in the work dir
    classes: list[str] | None
    parameters: int
    precision: str  # of the weights
    averaged: bool  # whether they are an exponential moving average
    license: str | None
    measured: list[Measurement] = field(default_factory=list)
    hardware: dict[str, str] = field(default_factory=dict)

    @property
    def backbone(self) -> str:
        """'VOLO-D1', or the name of another's class."""
        backbone = self.config['model'].get('backbone') or {}
        if backbone.get('type') != 'VOLO':
            return str(backbone.get('type', 'backbone'))
        return f'VOLO-{backbone["arch"].upper()}' if isinstance(backbone.get('arch'), str) else 'VOLO of its own size'

    @property
    def head(self) -> str:
        """'UPerNet', or the name of another's class."""
        head = self.config['model'].get('decode_head') or {}
        head = head[-1] if isinstance(head, (list, tuple)) else head
        return _HEADS.get(head.get('type'), str(head.get('type', 'head')))

    @property
    def data(self) -> str:
        """Name of the training data."""
        return dataset_name(str(_dataset(self.config, 'train').get('type', '')))


def card(facts: Facts) -> str:
    """The README.md of a published model, with the hub's metadata on top."""
    kind = _identifier(facts.data)
    data = ModelCardData(
        license=facts.license,
        library_name='mmsegmentation',
        pipeline_tag='image-segmentation',
        tags=['semantic-segmentation', 'volo', _identifier(facts.head), 'mmsegmentation', 'mmseg_volo', 'pytorch'],
        datasets=[kind] if kind != 'unnamed-data' else None,
        metrics=['mean_iou', 'accuracy'] if facts.measured else None,
        model_name=facts.name,
        eval_results=_results(facts) or None,
    )
    if not facts.measured:
        data.pop('model_name')
    parts = [_head(facts), _measured(facts), _training(facts), _use(facts), _limits(facts), _license(facts)]
    body = '\n\n'.join([*parts, f'## Citation\n\nThe backbone is from [{_TITLE}]({_PAPER}):\n\n{_CITATION}'])
    return ModelCard(f'---\n{data.to_yaml()}\n---\n\n{body}\n').content


def metafile(facts: Facts) -> str:
    """The metafile.yml of a published model, in OpenMMLab's form."""
    results = [
        dict(
            Task='Semantic Segmentation',
            Dataset=_measured_on(one),
            Metrics={'mIoU(ms+flip)' if one.aug_test else 'mIoU': round(one.miou, 2)},
        )
        for one in facts.measured
    ]
    model = {
        'Name': facts.name,
        'In Collection': 'VOLO',
        'Config': 'config.py',
        'Metadata': {
            'Training Data': facts.data,
            'Batch Size': _batch(facts),
            'Architecture': [facts.backbone, facts.head],
            'Iterations': facts.meta.get('iter'),
            'Parameters': facts.parameters,
        },
        'Results': results,
        'Weights': facts.weights,
        'Framework': 'PyTorch',
    }
    model['Metadata'] = {key: value for key, value in model['Metadata'].items() if value is not None}
    collection = {'Name': 'VOLO', 'Paper': {'Title': _TITLE, 'URL': _PAPER}, 'Frameworks': ['PyTorch']}
    if facts.license:
        model['License'] = facts.license
    model = {key: value for key, value in model.items() if value != []}
    return yaml.safe_dump({'Collections': [collection], 'Models': [model]}, sort_keys=False, width=120)


def _results(facts: Facts) -> list[EvalResult]:
    out = []
    for one in facts.measured:
        figures = [('mean_iou', 'mIoU', one.miou), ('accuracy', 'pixel accuracy', one.pixel_accuracy)]
        for metric, name, value in figures:
            how = ', '.join(['multi-scale and flip' if one.aug_test else 'single-scale', *one.options])
            out.append(
                EvalResult(
                    task_type='image-segmentation',
                    task_name='Semantic Segmentation',
                    dataset_type=_identifier(dataset_name(one.dataset)),
                    dataset_name=dataset_name(one.dataset),
                    dataset_split=PurePosixPath(one.folder).name or None,
                    metric_type=metric,
                    metric_name=f'{name} in percent, {how}, {one.pictures} pictures',
                    metric_value=round(value, 2),
                )
            )
    return out


def _head(facts: Facts) -> str:
    count = facts.config['model'].get('decode_head', {})
    count = count[-1] if isinstance(count, (list, tuple)) else count
    named = f': {", ".join(map(_safe, facts.classes))}' if facts.classes else ', whose names no file says'
    number = len(facts.classes) if facts.classes else count.get('num_classes')
    rows = [
        (facts.weights, f'weights ({facts.precision}), with names and colours of the classes and the config'),
        (facts.safetensors, 'the same weights in safetensors, with the same beside them'),
        ('config.py', 'the config of MMSegmentation, in one file'),
        ('metafile.yml', "OpenMMLab's metafile"),
    ]
    return '\n'.join(
        [
            f'# {facts.name}',
            '',
            f'Semantic segmentation on MMSegmentation with [VOLO]({_PAPER}): {facts.backbone} and a {facts.head} head, '
            f'{facts.parameters / 1e6:.1f} M parameters, trained on {facts.data}. It gives every pixel of a picture '
            f'one of {number} classes{named}.',
            '',
            *_table(['file', 'holds'], [(f'`{file}`', what) for file, what in rows]),
        ]
    )


def _measured(facts: Facts) -> str:
    if not facts.measured:
        return '## Results\n\nNo measurement came with this checkpoint: how good it is, is not known from its files.'
    rows = [
        (
            _how(one),
            f'{one.pictures}',
            f'{one.miou:.2f}',
            f'{one.pixel_accuracy:.2f}',
            f'{one.mean_accuracy:.2f}',
        )
        for one in facts.measured
    ]
    first = facts.measured[0]
    lines = ['## Results', '', 'In percent; mIoU and class accuracy are means over the classes that occur.', '']
    lines += _table(['measured', 'pictures', 'mIoU', 'pixel accuracy', 'class accuracy'], rows)
    lines += ['', *(f'- {_where(one)}' for one in facts.measured)]
    lines += ['', 'IoU of each class, and how much of the labelled pixels it is:', '']
    same = [one for one in facts.measured if one.classes == first.classes]
    share = first.pixels / first.pixels.sum() * 100
    lines += _table(
        ['class', *(_how(one) for one in same), 'share of pixels'],
        [
            (_safe(name), *(_percent(one.iou[i]) for one in same), f'{share[i]:.2f}')
            for i, name in enumerate(first.classes)
        ],
    )
    missed = [_safe(name) for i, name in enumerate(first.classes) if first.accuracy[i] == 0]
    if missed:
        lines += ['', f'Of {", ".join(missed)} it found no pixel at all ({_how(first)}).']
    lines += ['', f'To repeat it, with the data in `{_dataset(facts.config, "test").get("data_root", "data")}`:', '']
    return '\n'.join([*lines, '```bash', *dict.fromkeys(_command(one, facts) for one in facts.measured), '```'])


def _how(one: Measurement) -> str:
    how = 'multi-scale' if one.aug_test else 'single-scale'
    return ', '.join([how, *(_safe(option.rpartition('.')[2]) for option in one.options)])


def _measured_on(one: Measurement) -> str:
    return f'{dataset_name(one.dataset)} {PurePosixPath(one.folder).name}'.strip()


def _where(one: Measurement) -> str:
    views = f', at {one.views}' if one.views else ''
    device = f', on {"a CPU" if one.device == "cpu" else _safe(one.device)}' if one.device else ''
    return f'{_how(one)}: {one.pictures} pictures of {_measured_on(one)} (`{one.folder}`){views}; {one.date}{device}'


def _command(one: Measurement, facts: Facts) -> str:
    options = f' --cfg-options {" ".join(map(_quoted, one.options))}' if one.options else ''
    return f'python tools/test.py config.py {facts.weights}{" --aug-test" if one.aug_test else ""}{options}'


def _training(facts: Facts) -> str:
    config, meta = facts.config, facts.meta
    rows = [('data', _data_row(facts))]
    length = (config.get('train_cfg') or {}).get('max_iters')
    if meta.get('iter'):
        rows.append(('iterations', f'{meta["iter"]:,}' + (f' of {length:,}' if isinstance(length, int) else '')))
    batch, processes = _batch(facts), meta.get('world_size')
    if batch and processes:
        rows.append(('batch', f'{batch} pictures ({processes} process{"es" if processes > 1 else ""})'))
    size = config.get('crop_size') or (config['model'].get('data_preprocessor') or {}).get('size')
    if isinstance(size, (list, tuple)) and len(size) == 2:
        rows.append(('crops', f'{size[0]} × {size[1]} (height × width)'))
    wrapper = config.get('optim_wrapper') or {}
    optimizer = wrapper.get('optimizer') or {}
    if optimizer.get('type'):
        options = ', '.join(f'{k} {_number(v)}' for k, v in optimizer.items() if k not in ('type', 'fused'))
        rows.append(('optimizer', f'{optimizer["type"]}{f" ({options})" if options else ""}'))
    schedule = config.get('param_scheduler') or []
    schedule = [s for s in (schedule if isinstance(schedule, list) else [schedule]) if isinstance(s, dict)]
    if schedule:
        rows.append(('schedule', ', then '.join(_phase(step) for step in schedule)))
    rows.append(('arithmetic', _PRECISIONS.get(wrapper.get('type'), 'float32')))
    rows.append(('start', _start(facts)))
    if facts.averaged:
        rows.append(('weights', 'exponential moving average over the training'))
    if meta.get('seed') is not None:
        rows.append(('seed', meta['seed']))
    rows += [('hardware', _safe(facts.hardware['devices']))] if 'devices' in facts.hardware else []
    saved_by = str(meta.get('sealed_by', ''))
    versions = [saved_by, f'mmengine {meta["mmengine_version"]}' if meta.get('mmengine_version') else '']
    versions.append(f'PyTorch {facts.hardware["PyTorch"]}' if 'PyTorch' in facts.hardware else '')
    if any(versions):
        rows.append(('software', _safe(', '.join(filter(None, versions)))))
    return '\n'.join(['## Training', '', *_table(['', ''], [(key, str(value)) for key, value in rows])])


def _data_row(facts: Facts) -> str:
    dataset = _dataset(facts.config, 'train')
    folder = (dataset.get('data_prefix') or {}).get('img_path')
    return f'{facts.data} (`{dataset.get("type", "")}`{f", `{folder}`" if folder else ""})'


def _batch(facts: Facts) -> int | None:
    """Pictures of one step of the optimizer, over all processes."""
    each, processes = (facts.config.get('train_dataloader') or {}).get('batch_size'), facts.meta.get('world_size')
    accumulated = (facts.config.get('optim_wrapper') or {}).get('accumulative_counts', 1)
    return each * processes * accumulated if isinstance(each, int) and isinstance(processes, int) else None


def _phase(step: dict) -> str:
    unit = 'epoch' if step.get('by_epoch', True) else 'iteration'
    span = f'{unit} {step.get("begin", 0):,} to {step["end"]:,}' if isinstance(step.get('end'), int) else ''
    skipped = {'type', 'by_epoch', 'begin', 'end', 'convert_to_iter_based'}
    options = [f'{key} {_number(value)}' for key, value in step.items() if key not in skipped]
    return f'{step.get("type")} ({", ".join(filter(None, [span, *options]))})'


def _start(facts: Facts) -> str:
    """From which weights training began, by the config that it was trained with."""
    given = facts.trained.get('load_from')
    if given and not facts.trained.get('resume'):
        return f'the weights of another run, `{given if is_public(given) else last_part(str(given))}`'
    model = facts.trained.get('model') or {}
    init = (model.get('backbone') or {}).get('init_cfg')
    init = init if isinstance(init, list) else [init]
    sources = [one['checkpoint'] for one in init if isinstance(one, dict) and one.get('type') == 'Pretrained']
    sources += [model['pretrained']] if model.get('pretrained') else []
    if not sources:
        return _RANDOM
    return 'a backbone from ' + ', '.join(f'`{s if is_public(s) else last_part(str(s))}`' for s in sources)


def _use(facts: Facts) -> str:
    return f"""## Use

With `mmseg_volo` (`pip install -e .` in a clone of its repository, which brings
[MMSegmentation](https://github.com/open-mmlab/mmsegmentation) with it), in this folder:

```python
from mmseg.apis import inference_model

from mmseg_volo import init_model

model = init_model('config.py', '{facts.weights}')  # the .safetensors file works too
classes = inference_model(model, 'picture.jpg').pred_sem_seg.data[0]  # class ids (H, W)
```

```python
import mmseg_volo
from mmseg.apis import MMSegInferencer

inferencer = MMSegInferencer(model='config.py', weights='{facts.weights}')
inferencer('picture.jpg', out_dir='predictions')
```

From a clone of `mmseg_volo`, with the paths of these files:

```bash
python tools/predict.py config.py {facts.weights} 'pictures/*.jpg' --out predictions --overlay
python tools/train.py config.py --cfg-options load_from={facts.weights}  # fine-tuning
```

Both weight files are read without running code. The eight hex digits in their names begin their SHA-256, so that
`torch.hub.load_state_dict_from_url(URL, check_hash=True)` checks a download."""


def _limits(facts: Facts) -> str:
    config, lines = facts.config, ['It knows these classes only: whatever a pixel shows, it gets one of them.']
    pipeline = _dataset(config, 'test').get('pipeline') or []
    resize = next((t for t in pipeline if isinstance(t, dict) and t.get('type') == 'Resize'), {})
    test_cfg = config['model'].get('test_cfg') or {}
    if isinstance(resize.get('scale'), (list, tuple)):
        width, height = resize['scale']
        lines.append(
            f'Pictures are resized to {"fit into " if resize.get("keep_ratio") else ""}{width} × {height} pixels '
            '(width × height) before the network sees them; larger ones lose their fine detail.'
        )
    if test_cfg.get('mode') == 'slide':
        lines.append(f'It looks at windows of {" × ".join(map(str, test_cfg["crop_size"]))} pixels (height × width).')
    start = '' if _start(facts) == _RANDOM else f', beginning with {_start(facts)}'
    lines.append(f'It was trained on {facts.data}{start}. Pictures unlike those are outside of what it has seen.')
    if facts.measured:
        places = dict.fromkeys(f'{_measured_on(one)} (`{one.folder}`)' for one in facts.measured)
        lines.append(
            f'It was measured on {", ".join(places)}. How it does on other data, cameras, places, weather or light was '
            'not measured, nor how its errors fall on different people.'
        )
        validation = (_dataset(config, 'val').get('data_prefix') or {}).get('img_path')
        if any(one.folder.rstrip('/') == str(validation).rstrip('/') for one in facts.measured):
            chosen = ' and this checkpoint was kept as the best of them' if facts.checkpoint.startswith('best_') else ''
            lines.append(
                f'The pictures in `{validation}` were the validation set of the training{chosen}: on pictures that '
                'had no part in the training at all the figures may be lower.'
            )
    else:
        lines.append(
            'It was not measured, as far as its files tell: test it on pictures of your own before you rely on it.'
        )
    foreign = [name for name in config['custom_imports']['imports'] if name != 'mmseg_volo']
    if foreign:
        lines.append(f'`config.py` imports {", ".join(foreign)}, which is not part of `mmseg_volo`.')
    return '\n'.join(['## Limits', '', *(f'- {line}' for line in lines)])


def _license(facts: Facts) -> str:
    terms = f'The terms of {facts.data}, on which it was trained, may limit what it may be used for.'
    if facts.license:
        return f'## Licence\n\n`{facts.license}`. {terms}'
    return (
        '## Licence\n\nNone is stated yet. Who shares this model must choose one (`tools/publish.py --license`, or '
        f'`license:` at the top of this file); until then nobody may assume any rights to it. {terms}'
    )


def _dataset(config: dict, which: str) -> dict:
    dataset = (config.get(f'{which}_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset or 'datasets' in dataset:  # wrappers
        dataset = dataset['dataset'] if 'dataset' in dataset else dataset['datasets'][0]
    return dataset


def _table(header: list[str], rows: list[tuple]) -> list[str]:
    return [f'| {" | ".join(row)} |' for row in (header, ['---'] * len(header), *rows)]


def _percent(value: float) -> str:
    return '–' if np.isnan(value) else f'{value:.2f}'


def _number(value: object) -> str:
    return f'{value:g}' if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _identifier(name: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')


def _safe(text: object) -> str:
    """Text that Markdown takes as text, in a table too."""
    return re.sub(r'([\\`*_\[\]<>|#])', r'\\\1', ' '.join(str(text).split()))


def _quoted(option: str) -> str:
    return option if re.fullmatch(r'[\w.=/,-]+', option) else f'"{option}"'
