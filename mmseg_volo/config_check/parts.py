"""The parts of a config from which objects are built: the model's, the data sets', the runner's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.hooks import EMAHook
from mmengine.registry import Registry
from mmseg import registry as registries

from .lookup import NOTHING, default_of, find

# Keys of a model below which other parts of it are built from MODELS.
_NESTED = (
    'module',
    'data_preprocessor',
    'backbone',
    'neck',
    'decode_head',
    'auxiliary_head',
    'kernel_generate_head',
    'kernel_update_head',
    'loss_decode',
)
_LAYERS = 'norm_cfg', 'act_cfg'  # their other keys depend on the layer
_TYPES = 'runner_type', 'optim_wrapper.constructor'  # keys whose value is a type
HEADS = 'decode_head', 'auxiliary_head'
ANY = '*'  # as an extra key: all keys are accepted


@dataclass(frozen=True)
class Part:
    """A part of a config from which one object is built.

    Attributes:
        key: its place in the config, such as 'model.decode_head'.
        cfg: the part itself.
        registry: where its ``type`` is looked up.
        kind: the class of its ``type``; None if there is no such class, ``UNKNOWN`` if it could only be imported.
        extra: keys that are taken out before the constructor is called, or ``ANY``.
    """

    key: str
    cfg: Mapping
    registry: Registry
    kind: Any
    extra: tuple[str, ...] = ()

    @property
    def type_key(self) -> str:
        """The key that holds the type; of some parts it is the whole value."""
        return self.key if self.key in _TYPES or self.key.endswith('.ema_type') else f'{self.key}.type'

    def get(self, name: str) -> Any:
        """The value of a key, or the constructor's default, or ``NOTHING``."""
        return self.cfg.get(name, default_of(self.kind, name))

    def is_a(self, *kinds: type) -> bool:
        """Whether the class is one of these or derived from them."""
        return isinstance(self.kind, type) and issubclass(self.kind, kinds)


class Parts:
    """Walk through the parts of a config. What is no mapping (an object, a mistake) is passed over.

    Args:
        config: the whole config.
        scope: default scope of its ``type`` names, where the config sets none.
    """

    def __init__(self, config: Mapping, scope: str = 'mmengine'):
        self.config = config
        self.scope = _text(config.get('default_scope')) or scope

    def part(self, key: str, cfg: Mapping, registry: Registry, *extra: str, default: Any = None) -> Part:
        """One part; ``default`` is its ``type`` if it has none."""
        kind = cfg.get('type', default)
        scope = _text(cfg.get('_scope_')) or self.scope
        return Part(key, cfg, registry, find(registry, kind, scope), ('_scope_', *extra))

    def model(self) -> list[Part]:
        """The segmentor and the parts of it."""
        model = self.config.get('model')
        if not isinstance(model, Mapping):
            return []
        found = list(self._model(model, 'model'))
        shared = self.config.get('data_preprocessor')
        if isinstance(shared, Mapping) and 'data_preprocessor' not in model:  # as mmengine's Runner does
            found += self._model(shared, 'data_preprocessor')
        return found

    def _model(self, cfg: Mapping, key: str) -> Iterator[Part]:
        yield self.part(key, cfg, registries.MODELS)
        for name in _NESTED:
            for place, inner in each(cfg.get(name), f'{key}.{name}'):
                yield from self._model(inner, place)
        for place, inner in each(cfg.get('init_cfg'), f'{key}.init_cfg'):
            yield self.part(place, inner, registries.WEIGHT_INITIALIZERS, 'override')
        for name in _LAYERS:
            if isinstance(cfg.get(name), Mapping):
                yield self.part(f'{key}.{name}', cfg[name], registries.MODELS, ANY)

    def datasets(self, split: str) -> list[Part]:
        """The data sets of a split with their wrappers."""
        loader = self.config.get(f'{split}_dataloader')
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        return list(self._datasets(dataset, f'{split}_dataloader.dataset'))

    def _datasets(self, cfg: Any, key: str) -> Iterator[Part]:
        for place, one in each(cfg, key):
            yield self.part(place, one, registries.DATASETS)
            for name in ('dataset', 'datasets'):
                yield from self._datasets(one.get(name), f'{place}.{name}')

    def transforms(self, dataset: Part) -> list[Part]:
        """The transforms of one data set's own pipeline, with nested ones."""
        return list(self._transforms(dataset.cfg.get('pipeline'), f'{dataset.key}.pipeline'))

    def _transforms(self, cfg: Any, key: str) -> Iterator[Part]:
        for place, one in each(cfg, key):
            part = self.part(place, one, registries.TRANSFORMS)
            yield part
            if getattr(part.kind, '__module__', '').startswith('mmcv.'):  # those of mmseg's Albu are Albumentations'
                yield from self._transforms(one.get('transforms'), f'{place}.transforms')

    def metrics(self, split: str) -> list[Part]:
        """The metrics of a split, whose evaluator is one of them, a list, or an Evaluator with ``metrics``."""
        evaluator, key = self.config.get(f'{split}_evaluator'), f'{split}_evaluator'
        if isinstance(evaluator, Mapping) and 'metrics' in evaluator:
            evaluator, key = evaluator['metrics'], f'{key}.metrics'
        return [self.part(place, one, registries.METRICS) for place, one in each(evaluator, key)]

    def samplers(self, split: str) -> list[Part]:
        """The samplers of a split's data loader."""
        loader = self.config.get(f'{split}_dataloader')
        loader = loader if isinstance(loader, Mapping) else {}
        return [
            self.part(place, one, registries.DATA_SAMPLERS)
            for name in ('sampler', 'batch_sampler')
            for place, one in each(loader.get(name), f'{split}_dataloader.{name}')
        ]

    def loop(self, split: str) -> list[Part]:
        """The loop of a split."""
        cfg = self.config.get(f'{split}_cfg')
        if not isinstance(cfg, Mapping):
            return []
        if split == 'train':
            default = 'EpochBasedTrainLoop' if cfg.get('by_epoch') else 'IterBasedTrainLoop'
        else:
            default = 'ValLoop' if split == 'val' else 'TestLoop'
        part = self.part(f'{split}_cfg', cfg, registries.LOOPS, default=default)
        return [part if 'type' in cfg else Part(part.key, cfg, part.registry, part.kind, ('by_epoch', '_scope_'))]

    def optimization(self) -> list[Part]:
        """The optimizer with its wrapper, and the schedulers."""
        found = []
        wrapper = self.config.get('optim_wrapper')
        if isinstance(wrapper, Mapping):
            taken = 'constructor', 'paramwise_cfg', 'optimizer'
            found.append(self.part('optim_wrapper', wrapper, registries.OPTIM_WRAPPERS, *taken, default='OptimWrapper'))
            if 'constructor' in wrapper:
                constructor = dict(type=wrapper['constructor'])
                registry = registries.OPTIM_WRAPPER_CONSTRUCTORS
                found.append(self.part('optim_wrapper.constructor', constructor, registry, ANY))
            if isinstance(wrapper.get('optimizer'), Mapping):
                found.append(self.part('optim_wrapper.optimizer', wrapper['optimizer'], registries.OPTIMIZERS))
        schedulers = self.config.get('param_scheduler')
        lists = [('param_scheduler', schedulers)]
        if isinstance(schedulers, Mapping) and 'type' not in schedulers:  # by the name of the optimizer
            lists = [(f'param_scheduler.{name}', value) for name, value in schedulers.items()]
        for key, value in lists:
            for place, one in each(value, key):
                found.append(self.part(place, one, registries.PARAM_SCHEDULERS, 'convert_to_iter_based'))
        return found

    def surroundings(self) -> list[Part]:
        """What each runner builds: itself, hooks, visualizer, log processor."""
        config, found = self.config, []
        if config.get('runner_type') is not None:
            found.append(self.part('runner_type', dict(type=config['runner_type']), registries.RUNNERS, ANY))
        hooks = config.get('default_hooks')
        named = hooks.items() if isinstance(hooks, Mapping) else ()
        places = [(f'default_hooks.{name}', hook) for name, hook in named if isinstance(hook, Mapping)]
        for key, hook in [*places, *each(config.get('custom_hooks'), 'custom_hooks')]:
            found.append(self.part(key, hook, registries.HOOKS, 'priority'))
            if found[-1].is_a(EMAHook) and 'ema_type' in hook:
                found.append(self.part(f'{key}.ema_type', dict(type=hook['ema_type']), registries.MODELS, ANY))
        visualizer = config.get('visualizer')
        if isinstance(visualizer, Mapping):
            found.append(self.part('visualizer', visualizer, registries.VISUALIZERS, default='Visualizer'))
            for key, backend in each(visualizer.get('vis_backends'), 'visualizer.vis_backends'):
                found.append(self.part(key, backend, registries.VISBACKENDS))
        if isinstance(config.get('log_processor'), Mapping):
            key = 'log_processor'
            found.append(self.part(key, config[key], registries.LOG_PROCESSORS, default='LogProcessor'))
        return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def each(cfg: Any, key: str) -> Iterator[tuple[str, Mapping]]:
    """Yield the mappings in a value that may be one or a (nested) list of them, each after its key."""
    if isinstance(cfg, Mapping):
        yield key, cfg
    elif isinstance(cfg, Sequence) and not isinstance(cfg, str):
        for i, one in enumerate(cfg):
            yield from each(one, f'{key}.{i}')


def leaves(datasets: Sequence[Part]) -> list[Part]:
    """The data sets inside all wrappers."""
    inner = ('dataset', 'datasets')
    return [one for one in datasets if not any(isinstance(one.cfg.get(name), Mapping | list | tuple) for name in inner)]


def heads(model: Sequence[Part]) -> list[Part]:
    """The decode and auxiliary heads, and heads inside them."""
    return [part for part in model if part.get('num_classes') is not NOTHING and _below_head(part.key)]


def _below_head(key: str) -> bool:
    return any(name in HEADS for name in key.split('.')) and 'loss_decode' not in key
