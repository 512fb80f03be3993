"""Model card in the Hugging Face hub's format and OpenMMLab's metafile, from the facts that a model's files record.

Facts are a dict. ``card.md.jinja`` holds the words of the card and reads the facts by name.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..utils.unwrap import bare_dataset
from .results import Result, dataset_name
from .shareable_config import is_public, last_part

_TEMPLATE = Path(__file__).with_name('card.md.jinja')
_PAPER = {'Title': 'VOLO: Vision Outlooker for Visual Recognition', 'URL': 'https://arxiv.org/abs/2106.13112'}
_HEADS = {'LeanUPerHead': 'UPerNet', 'UPerHead': 'UPerNet', 'LeanFCNHead': 'FCN', 'FCNHead': 'FCN'}


def facts_of(config: dict, trained: dict, meta: Mapping) -> dict:
    """What a config and a checkpoint say about a model and its training.

    Args:
        config: as published.
        trained: as trained: it still names the weights that training started from.
        meta: ``meta`` of the checkpoint.
    """
    model, optim = config['model'], config.get('optim_wrapper') or {}
    train, val, test = (
        bare_dataset((config.get(f'{which}_dataloader') or {}).get('dataset')) for which in ('train', 'val', 'test')
    )
    backbone, head = model.get('backbone') or {}, model.get('decode_head') or {}
    head = head[-1] if isinstance(head, (list, tuple)) else head
    kind, arch = str(backbone.get('type', 'backbone')), backbone.get('arch')
    if kind == 'VOLO':
        kind = f'VOLO-{arch.upper()}' if isinstance(arch, str) else 'VOLO of its own size'
    each, processes = (config.get('train_dataloader') or {}).get('batch_size'), meta.get('world_size')
    known = isinstance(each, int) and isinstance(processes, int)
    steps = config.get('param_scheduler') or []
    run, pretrained = _start(trained)
    return dict(
        config=config,
        meta=meta,
        is_volo=backbone.get('type') == 'VOLO',
        backbone=kind,
        head=_HEADS.get(head.get('type'), str(head.get('type', 'head'))),
        num_classes=head.get('num_classes'),
        data=dataset_name(str(train.get('type', ''))),
        train=train,
        train_folder=_folder(train),
        val_folder=_folder(val),
        test=test,
        batch=each * processes * optim.get('accumulative_counts', 1) if known else None,
        optimizer=_call(optim.get('optimizer') or {}, 'fused'),
        schedule=[_phase(step) for step in (steps if isinstance(steps, list) else [steps]) if isinstance(step, dict)],
        run=run,
        pretrained=pretrained,
        from_scratch=not (run or pretrained) and 'experiment_name' in meta,  # published files do not keep their start
    )


def model_card(facts: dict) -> str:
    """The README.md of a published model, with the hub's metadata at the top.

    Args:
        facts: those of :func:`facts_of`, and ``name``, ``repo`` (on the hub, or None), ``weights``, ``safetensors``,
            ``classes``, ``parameters``, ``precision``, ``averaged``, ``best``, ``license``, ``hardware`` and
            ``results``.
    """

    def how(one: Result) -> str:
        scales = 'multi-scale' if one.aug_test else 'single-scale'
        return ', '.join(filter(None, [scales, one.views, *one.options, f'images: {one.images}']))

    figures = [
        EvalResult(
            task_type='image-segmentation',
            task_name='Semantic Segmentation',
            dataset_type=_identifier(one.dataset),
            dataset_name=one.dataset,
            dataset_split=PurePosixPath(one.folder).name or None,
            metric_type=metric,
            metric_name=f'{name} in percent, {how(one)}',
            metric_value=round(value, 2),
        )
        for one in facts['results']
        for metric, name, value in (('mean_iou', 'mIoU', one.miou), ('accuracy', 'pixel accuracy', one.pixel_accuracy))
    ]
    tags = ['semantic-segmentation', *['volo'] * facts['is_volo'], _identifier(facts['head'])]
    data = ModelCardData(
        license=facts['license'],
        library_name='mmseg_volo',
        pipeline_tag='image-segmentation',
        tags=[*tags, 'mmsegmentation', 'pytorch'],
        datasets=[_identifier(facts['data'])] if facts['train'].get('type') else None,
        metrics=['mean_iou', 'accuracy'] if figures else None,
        model_name=facts['name'] if figures else None,
        eval_results=figures or None,
    )
    facts = dict(facts, paper=_PAPER, commands=_commands(facts), text=_text, code=_code)
    return ModelCard.from_template(data, str(_TEMPLATE), **facts).content + '\n'


def metafile(facts: dict) -> str:
    """The metafile.yml of a published model, in OpenMMLab's form; ``facts`` as for :func:`model_card`."""
    metadata = {
        'Training Data': facts['data'],
        'Batch Size': facts['batch'],
        'Architecture': [facts['backbone'], facts['head']],
        'Iterations': facts['meta'].get('iter'),
        'Parameters': facts['parameters'],
    }
    model = {
        'Name': facts['name'],
        'In Collection': 'VOLO' if facts['is_volo'] else None,
        'Config': 'config.py',
        'Metadata': {key: value for key, value in metadata.items() if value is not None},
        'Results': [
            dict(
                Task='Semantic Segmentation',
                Dataset=one.data,
                Metrics={'mIoU(ms+flip)' if one.aug_test else 'mIoU': round(one.miou, 2)},
            )
            for one in facts['results']
        ],
        'Weights': facts['weights'],
        'Framework': 'PyTorch',
        'License': facts['license'],
    }
    collections = [{'Name': 'VOLO', 'Paper': _PAPER, 'Frameworks': ['PyTorch']}] if facts['is_volo'] else []
    models = [{key: value for key, value in model.items() if value}]
    return yaml.safe_dump({'Collections': collections, 'Models': models}, sort_keys=False, width=120)


def _folder(dataset: dict) -> str:
    return str((dataset.get('data_prefix') or {}).get('img_path') or '').rstrip('/')


def _start(trained: dict) -> tuple[str | None, list[str]]:
    """Names of the weights that training started from: those of another run, or those of the backbone."""

    def shown(source: object) -> str:
        return source if is_public(source) else last_part(str(source))

    if trained.get('load_from') and not trained.get('resume'):
        return shown(trained['load_from']), []
    model = trained.get('model') or {}
    init = (model.get('backbone') or {}).get('init_cfg')
    init = init if isinstance(init, list) else [init]
    sources = [one['checkpoint'] for one in init if isinstance(one, dict) and one.get('type') == 'Pretrained']
    return None, [shown(source) for source in [*sources, model.get('pretrained')] if source]


def _call(config: dict, *hidden: str) -> str:
    """'AdamW (lr 6e-05, weight_decay 0.01)' of ``dict(type='AdamW', lr=6e-5, weight_decay=0.01)``."""
    options = {key: value for key, value in config.items() if key not in ('type', *hidden)}
    number = {key: f'{value:g}' for key, value in options.items() if type(value) in (int, float)}
    shown = ', '.join(f'{key} {number.get(key, value)}' for key, value in options.items())
    return f'{config.get("type", "")} ({shown})' if shown else str(config.get('type', ''))


def _phase(step: dict) -> str:
    """'PolyLR (iteration 0 to 160,000, power 1)'."""
    unit, end = 'epoch' if step.get('by_epoch', True) else 'iteration', step.get('end')
    span = {unit: f'{step.get("begin", 0):,} to {end:,}'} if isinstance(end, int) else {}
    return _call({**span, **step}, 'by_epoch', 'begin', 'end', 'convert_to_iter_based')


def _commands(facts: dict) -> list[str]:
    """Shell commands that repeat the evaluations, quoted for the shell; none with characters that cannot be seen."""
    commands = []
    for one in facts['results']:
        words = ['python', 'tools/test.py', 'config.py', facts['weights'], *['--aug-test'] * one.aug_test]
        commands.append(shlex.join([*words, *['--cfg-options'] * bool(one.options), *one.options]))
    return [line for line in dict.fromkeys(commands) if line.isprintable()]


def _identifier(name: str) -> str:
    return re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')


def _text(value: object) -> str:
    """A value as one line of Markdown that shows it as it is; lists are joined by commas, None is nothing."""
    line = ', '.join(map(str, value)) if isinstance(value, (list, tuple)) else str('' if value is None else value)
    line = ' '.join(''.join(char if char.isprintable() else ' ' for char in line).split())
    return re.sub(r'([\\`*_\[\]<>|#&~])', r'\\\1', line)


def _code(*values: object) -> str:
    """A code span for each value, or escaped text where a character would end the span or its table cell."""
    lines = [' '.join(str(value).split()) for value in values if value]
    return ', '.join(
        _text(line) if re.search('[`|]', line) or not line.isprintable() else f'`{line}`' for line in lines
    )
