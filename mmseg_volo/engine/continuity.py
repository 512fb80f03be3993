"""Compare a run with the checkpoint that it resumes from: optimizer, schedules and classes must be the same.

mmengine loads the saved states into whatever the config builds now. If they do not fit, training fails in its first
step, or goes on with other learning rates without a word.
"""

import os

from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper, OptimWrapperDict, _ParamScheduler
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import Dataset

from ..checkpoints.compatibility import dataset_meta_of
from ..errors import CheckpointError
from ..utils.unwrap import bare_model
from .loop import SeededDataset

# Entries of a schedule's state that change while it runs; the config sets the others.
_PROGRESS = {'last_step', 'base_values', '_global_step', '_last_value', 'best', 'num_bad_epochs', 'cooldown_counter'}


def note_of(runner: Runner) -> dict:
    """What a checkpoint notes about its run, as ``meta['run']``: types that the states do not tell, and the data."""
    wrappers = _wrappers(runner.optim_wrapper)
    return dict(
        optimizers={name: type(wrapper.optimizer).__name__ for name, wrapper in wrappers.items()},
        precision={name: type(wrapper).__name__ for name, wrapper in wrappers.items()},
        schedules={name: _types(some) for name, some in _lists(runner.param_schedulers).items()},
        data=_data_of(runner.train_dataloader.dataset),
        inputs=_inputs_of(runner),
    )


def check_continuity(runner: Runner, checkpoint: dict, source: str) -> None:
    """Reject a checkpoint whose states do not continue in this run, before any of them is loaded.

    Other images, labels, means and the like, another precision and other numbers in a schedule give warnings.

    Args:
        runner: with its training loop, optimizer and schedules built, else nothing is compared.
        checkpoint: the content of a file that holds the state of a training run.
        source: the file's name.

    Raises:
        CheckpointError: the optimizer, its parameter groups, the schedules or the classes are others; or the checkpoint
            has averaged weights, which this run does not average.
    """
    if not isinstance(runner._train_loop, BaseLoop) or not isinstance(runner.optim_wrapper, OptimWrapper):
        return
    note = checkpoint['meta'].get('run')
    note = note if isinstance(note, dict) else {}
    try:
        problem = (
            _other_optimizer(_wrappers(runner.optim_wrapper), checkpoint['optimizer'], note.get('optimizers') or {})
            or _other_schedules(_lists(runner.param_schedulers), checkpoint, note.get('schedules'))
            or _other_classes(runner.train_dataloader.dataset, checkpoint)
            or _other_average(runner, checkpoint)
        )
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        problem = f'the state of its optimizer or its schedules is damaged ({error!r})'
    if problem:
        raise CheckpointError(
            f'{source}: {problem}. Resume with the config of the checkpoint, or start from its weights alone with '
            f'--cfg-options load_from={source} instead of --resume'
        )
    own = note_of(runner)
    if note.get('precision') and note['precision'] != own['precision']:
        before, now = ('/'.join(part['precision'].values()) for part in (note, own))
        runner.logger.warning(f'RESUME: the checkpoint was trained with {before}, and this run uses {now}')
    if note.get('data') and note['data'] != own['data']:
        runner.logger.warning(
            f'RESUME: the checkpoint was trained on {_text(note["data"])}, and this run has {_text(own["data"])}: if '
            'these are other files, it sees other images from here on than an uninterrupted run'
        )
    before = note.get('inputs')
    before = before if isinstance(before, dict) else {}
    for name, value in own['inputs'].items():
        if before.get(name, value) != value:
            runner.logger.warning(
                f'RESUME: the checkpoint was trained with {name}={before[name]}, and this run has {value}: the weights '
                'have learnt from other labels or inputs'
            )
    for name, schedules in _lists(runner.param_schedulers).items():
        for schedule, state in zip(schedules, _lists(checkpoint['param_schedulers'])[name], strict=True):
            for key, value in schedule.state_dict().items():
                if key not in _PROGRESS and isinstance(value, (int, float)) and state.get(key, value) != value:
                    runner.logger.warning(
                        f'RESUME: {type(schedule).__name__} goes on with {key}={state[key]} of the checkpoint, not '
                        f'with {value} of the config'
                    )


def _other_optimizer(wrappers: dict[str, OptimWrapper], saved: dict, names: dict) -> str | None:
    states = {'': saved} if 'param_groups' in saved else saved
    if wrappers.keys() != states.keys():
        return f'has states of {len(states)} optimizers, and this run has {len(wrappers)}'
    for key, wrapper in wrappers.items():
        optimizer, groups = wrapper.optimizer, states[key]['param_groups']
        own, before = type(optimizer).__name__, names.get(key)
        if before is None:  # a checkpoint of mmengine
            needed, there = (set(some[0]) - {'initial_lr'} for some in (optimizer.param_groups, groups))
            if needed - there and there - needed:  # a version of PyTorch may add options, but removes none
                before = f'another optimizer, one with {", ".join(sorted(there - needed))}'
        sizes, saved_sizes = ([len(group['params']) for group in some] for some in (optimizer.param_groups, groups))
        if (before or own) != own:
            return f'was trained with {before}, and this run uses {own}'
        if sizes != saved_sizes:
            return (
                f'its {own} has {len(saved_sizes)} parameter groups ({sum(saved_sizes)} parameters), and that of this '
                f'run has {len(sizes)} ({sum(sizes)} parameters), which optim_wrapper.paramwise_cfg decides'
            )
    return None


def _other_schedules(schedules: dict[str, list], checkpoint: dict, names: dict | None) -> str | None:
    states = _lists(checkpoint.get('param_schedulers'))
    own = {name: _types(some) for name, some in schedules.items()}
    if names is not None:
        same = names == own
        if same and states.keys() != own.keys():
            return 'holds no state of its param_scheduler (save_param_scheduler=False)'
    else:
        same = {name: len(some) for name, some in states.items()} == {name: len(some) for name, some in own.items()}
        same = same and all(
            _same_kind(schedule.state_dict(), state)
            for name, some in schedules.items()
            for schedule, state in zip(some, states[name], strict=True)
        )
        names = {name: ['another schedule'] * len(some) for name, some in states.items()}
    if same:
        return None
    before, now = (' and '.join(one for some in part.values() for one in some) or 'none' for part in (names, own))
    return f'was trained with param_scheduler {before}, and this run has {now}'


def _same_kind(first: dict, second: dict) -> bool:
    """Whether two states may be of one type: a version of mmengine may add entries, but removes none."""
    return not first.keys() - second.keys() or not second.keys() - first.keys()


def _other_classes(dataset: Dataset, checkpoint: dict) -> str | None:
    before = list(dataset_meta_of(checkpoint).get('classes') or ())
    own = list(getattr(dataset, 'metainfo', {}).get('classes') or ())
    if not before or not own or [str(name).casefold() for name in before] == [str(name).casefold() for name in own]:
        return None
    if len(before) != len(own):
        return f'was trained on {len(before)} classes, and train_dataloader.dataset has {len(own)}'
    other = [(one, two) for one, two in zip(before, own, strict=True) if str(one).casefold() != str(two).casefold()]
    return (
        f'was trained on other classes than those of train_dataloader.dataset: {len(other)} of {len(own)}, such as '
        f'{other[0][0]!r} for {other[0][1]!r}'
    )


def _other_average(runner: Runner, checkpoint: dict) -> str | None:
    if 'ema_state_dict' in checkpoint and not any(isinstance(hook, EMAHook) for hook in runner.hooks):
        return 'its state_dict holds averaged weights, which are not those that were trained; add --ema'
    return None


def _data_of(dataset: Dataset) -> dict:
    """Type, root and number of images of a data set; of several data sets, type and root of the first."""
    dataset = dataset.dataset if isinstance(dataset, SeededDataset) else dataset
    first = _first(dataset)
    root = getattr(first, 'data_root', None)
    return dict(type=type(first).__name__, root=os.path.normpath(root) if root else '', images=len(dataset))


def _first(dataset: Dataset) -> Dataset:
    while not hasattr(dataset, 'data_root') and (hasattr(dataset, 'dataset') or hasattr(dataset, 'datasets')):
        dataset = dataset.dataset if hasattr(dataset, 'dataset') else dataset.datasets[0]
    return dataset


def _inputs_of(runner: Runner) -> dict:
    """How labels and images are changed on their way to the model, as far as known."""
    preprocessor = getattr(bare_model(runner.model), 'data_preprocessor', None)
    numbers = {name: getattr(preprocessor, name, None) for name in ('mean', 'std')}
    return dict(
        {name: [round(x, 4) for x in some.flatten().tolist()] for name, some in numbers.items() if some is not None},
        reduce_zero_label=getattr(_first(runner.train_dataloader.dataset), 'reduce_zero_label', None),
        # The attribute's name depends on the version of mmseg.
        bgr_to_rgb=getattr(preprocessor, '_channel_conversion', getattr(preprocessor, 'channel_conversion', None)),
    )


def _text(data: dict) -> str:
    return f'{data.get("images")} images of {data.get("type")} in {data.get("root") or "an unknown place"}'


def _wrappers(wrapper: OptimWrapper | dict) -> dict[str, OptimWrapper]:
    """The optimizer wrappers by name, the only one under ''; none if they are not built yet."""
    if isinstance(wrapper, OptimWrapperDict):
        return dict(wrapper.items())
    return {'': wrapper} if isinstance(wrapper, OptimWrapper) else {}


def _lists(schedules: dict | list | None) -> dict[str, list]:
    """Schedules, or their states, by the name of their optimizer; an only list under ''."""
    lists = schedules if isinstance(schedules, dict) else {'': schedules or []}
    return {name: list(some) for name, some in lists.items() if some}


def _types(schedules: list[_ParamScheduler]) -> list[str]:
    return [type(schedule).__name__ for schedule in schedules]
