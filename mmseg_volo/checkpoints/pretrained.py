"""Load official and timm VOLO weights into the backbone."""

import torch
from mmengine.logging import print_log
from timm.models import adapt_input_conv
from torch import nn

from ..errors import CheckpointError
from .compatibility import fits, listed
from .content import WEIGHT_KEYS
from .reading import load

# Weights of the ImageNet classifier alone; all others in a file must fit the backbone.
CLASSIFIER = ('head.', 'aux_head.', 'post_network.', 'cls_token')
STEM = 'patch_embed.conv.0.weight'  # (width, channels of the image, 7, 7)
# Where a file may hold its weights. The exponential moving average comes first, as in timm.
STATE_KEYS = tuple(sorted(WEIGHT_KEYS, key='state_dict_ema'.__ne__))


def volo_state_dict(content: dict, source: str, prefix: str | None = None) -> dict[str, torch.Tensor]:
    """Find the weights of a VOLO in the content of a file, under their official names.

    Args:
        content: the file's dict: ``state_dict_ema``, ``state_dict`` or bare weights, of a classifier or a segmentor.
        source: the file's name, for error messages.
        prefix: see :func:`load_backbone`.

    Returns:
        Name to tensor, without the prefix ``module.`` (data parallel) and the one of the backbone.

    Raises:
        CheckpointError: the content has no weights, or not those of a VOLO.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'{source}: expected a dict of weights, found {type(content).__name__}')
    key = next((key for key in STATE_KEYS if isinstance(content.get(key), dict)), None)
    state = content[key] if key else content
    state = {str(name).removeprefix('module.'): value for name, value in state.items()}
    start = f'{(prefix or "backbone").removesuffix(".")}.'
    if prefix or any(name.startswith(start) for name in state):
        found = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        if not found:
            raise CheckpointError(f'{source}: no name begins with {start}, the prefix in init_cfg')
        state = found
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    if not {STEM, 'network.0.0.attn.attn.weight'} <= tensors.keys():
        names = ', '.join(list(map(str, state))[:4]) or 'nothing'
        raise CheckpointError(
            f'{source}: expected the weights of a VOLO ({STEM}, network.0.0.attn.attn.weight, ...), found {names}, ...'
        )
    return tensors


def describe(state: dict[str, torch.Tensor], archs: dict[str, dict]) -> str:
    """Name the variant in ``archs`` that a state dict belongs to: 'VOLO-D3 (blocks 8-8-16-4, widths 256/512)'."""
    blocks: dict[int, set[str]] = {}
    for name in state:
        parts = name.split('.')
        if parts[0] == 'network' and len(parts) > 3 and parts[2].isdigit():
            blocks.setdefault(int(parts[1]), set()).add(parts[2])
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    widths = [state['patch_embed.proj.weight'].shape[0]] if 'patch_embed.proj.weight' in state else []
    if 'network.1.proj.weight' in state:
        widths.append(state['network.1.proj.weight'].shape[0])
    numbers = f'blocks {"-".join(map(str, depths))}, widths {"/".join(map(str, widths))}'
    for arch, spec in archs.items():
        if depths == spec['depths'] and widths == [spec['dims'][0], spec['dims'][1]]:
            return f'VOLO-{arch.upper()} ({numbers})'
    return f'a VOLO with {numbers}'


def load_backbone(backbone: nn.Module, source: str, prefix: str | None = None) -> None:
    """Load pretrained weights into a :class:`~mmseg_volo.models.volo.VOLO`.

    Weights of the classifier, and of stages and norms that ``backbone`` was built without, are skipped. The LayerNorms
    of all levels but the last may be missing, because classifiers do not have them. The log says what was skipped and
    what was missing. ``pos_embed`` is resized to the backbone's image size. If the file is for three channels and the
    backbone for another number, timm adapts the first convolution: the weights of the channels are repeated and scaled
    by 3 / ``in_channels``, or added for one channel.

    Args:
        backbone: the VOLO that takes the weights.
        source: a path, a URL or ``timm://MODEL.TAG``.
        prefix: what the names of the backbone's weights begin with in the file; by default ``backbone.`` or nothing.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: the file is broken or unsafe, or holds no VOLO or another variant. The backbone is unchanged.
    """
    state = volo_state_dict(load(source), source, prefix)
    own, archs = backbone.state_dict(), backbone.arch_settings
    classifier = [name for name in state if name.startswith(CLASSIFIER)]
    # A backbone with fewer stages, or without output norms, does not need these.
    unbuilt = [name for name in state if name not in own and name not in classifier and _is_unbuilt(name, backbone)]
    used = {name: value for name, value in state.items() if name not in {*classifier, *unbuilt}}
    _adapt_stem(used, own[STEM].shape[1], source)

    unknown = [name for name in used if name not in own]
    missing = [name for name in own if name not in used and not _may_miss(name)]
    mismatched = [name for name in used if name in own and not fits(name, used[name], own[name])]
    if unknown or missing or mismatched:
        raise CheckpointError(
            f'{source}: expected weights of {describe(own, archs)}, found {describe(state, archs)}'
            + listed('missing', missing)
            + listed('unknown', unknown)
            + ''.join(f'; {n} is {tuple(used[n].shape)}, expected {tuple(own[n].shape)}' for n in mismatched[:3])
        )
    new = [name for name in own if name not in used and not name.endswith('num_batches_tracked')]
    backbone.load_state_dict({**{name: own[name] for name in own if name not in used}, **used})
    heads = sorted({name.split('.')[0] for name in classifier})
    print_log(
        f'Loaded {len(used)} of {len(state)} entries of {describe(state, archs)} from {source}. '
        f'Skipped: {", ".join(heads) or "nothing"} of the classifier ({len(classifier)} entries)'
        + (f' and {len(unbuilt)} entries of stages or norms that are not built' if unbuilt else '')
        + (f'. Not in the file, so kept at their initial values: {", ".join(new)}' if new else '')
        + '.',
        logger='current',
    )


def _adapt_stem(state: dict[str, torch.Tensor], channels: int, source: str) -> None:
    """Change the stem of weights for three channels to ``channels``, as timm does for ``in_chans``."""
    given = state[STEM].shape
    if len(given) != 4 or given[1] != 3 or channels == 3:
        return
    state[STEM] = adapt_input_conv(channels, state[STEM])
    how = 'added up' if channels == 1 else f'repeated and multiplied by 3/{channels}'
    print_log(
        f'{source}: for images of {channels} channel{"s" * (channels > 1)}, the weights of {STEM} for R, G and B are '
        f'{how}, as timm does',
        logger='current',
    )


def _is_unbuilt(name: str, backbone: nn.Module) -> bool:
    """Whether a weight belongs to a stage, norm or ``pos_embed`` that ``backbone`` was built without."""
    if name.startswith('norm'):
        return name.split('.')[0] not in dict(backbone.named_children())
    if name.startswith('network.'):
        return int(name.split('.')[1]) >= len(backbone.network) and backbone.out_indices[-1] < len(backbone.dims) - 1
    return name == 'pos_embed' and not hasattr(backbone, 'pos_embed')


def _may_miss(name: str) -> bool:
    level_norm = name.startswith('norm') and not name.startswith('norm.')
    return level_norm or name.endswith('num_batches_tracked')
