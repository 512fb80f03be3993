"""Measure this package: tools/benchmark.py COMMAND, each with --help.

inference, scaling and precision predict whole images; op, backbone and train time a part of the work against its peer;
models compares VOLO with other networks, validation the metrics; suite checks and measures everything on a GPU in a
given time.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import product
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from mmengine.device import get_device

from mmseg_volo import benchmark
from mmseg_volo.benchmark import (
    COMPILED,
    FILE_RUNTIMES,
    IMPLEMENTATIONS,
    MODES,
    NETWORKS,
    OPTIONS,
    RUNS,
    SIDES,
    Settings,
)
from mmseg_volo.benchmark.camvid import find_camvid
from mmseg_volo.benchmark.op import COMPILED as COMPILED_REFERENCE
from mmseg_volo.benchmark.op import REFERENCE
from mmseg_volo.benchmark.parts import PARTS
from mmseg_volo.benchmark.suite import Plan, run_suite
from mmseg_volo.benchmark.validation import measure_validation
from mmseg_volo.cli import run_tool
from mmseg_volo.models.volo import ARCHS
from mmseg_volo.models.windows import PRECISIONS


def above_zero(kind: type) -> Callable[[str], int | float]:
    def number(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float('inf'):
            raise argparse.ArgumentTypeError(f'must be above 0, got {text}')
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


COUNT, AMOUNT = above_zero(int), above_zero(float)


def op_shape(text: str) -> tuple[str, int]:
    arch, at, side = text.partition('@')
    if not at or not side.isdecimal():
        raise argparse.ArgumentTypeError(f'must be a variant and the side of the image, as d1@512, got {text}')
    return arch, int(side)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', help='cpu, cuda, cuda:1, ...; by default a GPU if there is one')
    parser.add_argument('--threads', type=COUNT, metavar='N', help="of PyTorch on a CPU; default PyTorch's choice")
    parser.add_argument('--out', default='work_dirs/benchmark', metavar='DIR', help='for the table (CSV) and the plot')


def add_arch_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--arch', nargs='+', choices=list(ARCHS), default=['d1'], metavar='ARCH', help='d1 ... d5')


def add_precision_argument(parser: argparse.ArgumentParser, others: str = 'others by autocast') -> None:
    parser.add_argument(
        '--precision', nargs='+', choices=list(PRECISIONS), default=['fp32'], help=f'default fp32; {others}'
    )


def add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--compile', action='store_true', help='torch.compile, our side only')
    parser.add_argument('--channels-last', action='store_true', help='memory format, our side only')


def add_batch_arguments(parser: argparse.ArgumentParser, batch: Sequence[int]) -> None:
    shown = ' '.join(map(str, batch))
    parser.add_argument('--size', nargs=2, type=COUNT, default=[512, 512], metavar=('H', 'W'), help='default 512 512')
    parser.add_argument('--batch', nargs='+', type=COUNT, default=batch, metavar='N', help=f'default {shown}')
    add_precision_argument(parser)
    parser.add_argument('--rounds', type=COUNT, default=5, help='default %(default)s')
    parser.add_argument('--no-memory', action='store_true', help='measure time only')
    add_machine_arguments(parser)


def add_peer_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--no-compiled', action='store_true', help='leave out the peer through torch.compile, which takes minutes'
    )


def add_case_arguments(parser: argparse.ArgumentParser, views: int) -> None:
    add_arch_argument(parser)
    parser.add_argument('--window', type=int, default=512, help='side of the sliding windows; default %(default)s')
    parser.add_argument('--stride', type=int, default=341, help='of the windows; default %(default)s')
    parser.add_argument(
        '--views', type=int, choices=[1, 10], default=views, help='10 is multi-scale and flip; default %(default)s'
    )
    add_precision_argument(parser)
    add_network_options(parser)
    parser.add_argument('--window-batch', type=COUNT, metavar='N', help='windows in a forward pass, our side only')
    parser.add_argument('--no-memory', action='store_true', help='measure time only')
    add_machine_arguments(parser)


def cases(kind: type, args: argparse.Namespace, **given) -> list:
    """A case for each combination of the options that take several values (lists); ``given`` replaces options."""
    values = {field.name: getattr(args, field.name) for field in fields(kind) if hasattr(args, field.name)}
    values |= {'size': tuple(args.size)} if 'size' in values else {}
    values |= given
    many = [name for name, value in values.items() if isinstance(value, list)]
    combinations = product(*(values[name] for name in many))
    return [kind(**{**values, **dict(zip(many, chosen, strict=True))}) for chosen in combinations]


def with_stock(kind: type) -> Callable[[argparse.Namespace], list]:
    """Cases of stock and ours, with the compiled peer between them if it is wanted."""

    def prepare(args: argparse.Namespace) -> list:
        wanted = not getattr(args, 'no_compiled', True)
        return cases(kind, args, sides=(SIDES[0], *[COMPILED] * wanted, SIDES[1]))

    return prepare


def scaling(args: argparse.Namespace) -> list:
    return cases(benchmark.ScalingCase, args, size=benchmark.sizes_of(args.megapixels))


def precision(args: argparse.Namespace) -> list:
    given = dict(device=args.device, threads=args.threads, aug_test=args.aug_test)
    return [
        benchmark.PrecisionCase.of(
            args.config, args.checkpoint, args.source, args.options, args.onnx, args.runtimes, args.limit, **given
        )
    ]


def op(args: argparse.Namespace) -> list:
    sides = REFERENCE, *[COMPILED_REFERENCE] * (not args.no_compiled), *dict.fromkeys(args.impl)
    shapes = [cases(benchmark.OpCase, args, arch=arch, image=image, sides=sides) for arch, image in args.shape]
    return [case for of_shape in shapes for case in of_shape]


def models(args: argparse.Namespace) -> list:
    sides = tuple(name for name in args.models if not (args.no_compiled and name.endswith('-compiled')))
    if not sides:
        raise ValueError('--no-compiled leaves none of --models')
    return cases(benchmark.ModelsCase, args, sides=sides, run_as=args.run)


def suite(args: argparse.Namespace, environment: dict, command: str) -> int:
    plan = Plan(args.device, Path(args.out), args.threads, not args.no_compiled, find_camvid(args.camvid))
    return run_suite([part for part in PARTS if part.name in args.parts], plan, args.minutes, command)


def validation(args: argparse.Namespace, environment: dict, command: str) -> None:
    measure_validation(tuple(args.size), args.classes, args.rounds, args.device, Path(args.out), environment)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description='Measure time, memory and predictions.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')

    sub = commands.add_parser('inference', help="stock mmseg with timm's VOLO against this package")
    sub.set_defaults(prepare=with_stock(benchmark.InferenceCase), parser=sub)
    sub.add_argument('--size', nargs=2, type=COUNT, default=[512, 1024], metavar=('H', 'W'), help='default 512 1024')
    sub.add_argument('--classes', nargs='+', type=COUNT, default=[19, 150], help='default 19 150')
    sub.add_argument('--rounds', type=COUNT, default=3, help='default %(default)s')
    add_case_arguments(sub, views=10)
    add_peer_argument(sub)

    sub = commands.add_parser('scaling', help='cost against the size of the image, this package only')
    sub.set_defaults(prepare=scaling, parser=sub, rounds=1)
    sub.add_argument('--megapixels', nargs='+', type=AMOUNT, default=[1, 2, 4, 8, 16, 24], help='default 1 2 4 8 16 24')
    sub.add_argument('--classes', type=COUNT, default=150, help='default %(default)s')
    add_case_arguments(sub, views=1)

    sub = commands.add_parser('precision', help='what each option changes on your model and your images')
    sub.set_defaults(prepare=precision, parser=sub)
    sub.add_argument('config', help='config file')
    sub.add_argument('checkpoint', help='checkpoint file')
    sub.add_argument('source', nargs='+', help='images, folders or quoted glob patterns')
    plain = [name for name in OPTIONS if name != 'compile']
    sub.add_argument('--options', nargs='+', choices=list(OPTIONS), default=plain, help='default: all but compile')
    sub.add_argument('--onnx', nargs='+', default=[], metavar='FILE', help='the model as exported by tools/export.py')
    sub.add_argument(
        '--runtimes',
        nargs='+',
        choices=list(FILE_RUNTIMES),
        default=['onnxruntime'],
        help='of --onnx; default onnxruntime',
    )
    sub.add_argument('--aug-test', '--tta', action='store_true', help='multi-scale and flip (tta_pipeline)')
    sub.add_argument('--limit', type=COUNT, default=10, metavar='N', help='images at most; default %(default)s')
    sub.add_argument('--rounds', type=COUNT, default=3, help='default %(default)s')
    add_machine_arguments(sub)

    sub = commands.add_parser('op', help='outlook attention alone, against its definition in plain PyTorch')
    sub.set_defaults(prepare=op, parser=sub)
    shapes = 'variant and side of the image in pixels; default d1@512 d4@1024'
    defaults = [('d1', 512), ('d4', 1024)]
    sub.add_argument('--shape', nargs='+', type=op_shape, default=defaults, metavar='ARCH@SIDE', help=shapes)
    sub.add_argument('--batch', nargs='+', type=COUNT, default=[1], metavar='N', help='default 1')
    add_precision_argument(sub, 'of both inputs')
    sub.add_argument('--mode', nargs='+', choices=MODES, default=list(MODES), help='full has backward; default both')
    sub.add_argument('--impl', nargs='+', choices=IMPLEMENTATIONS, default=['fused'], help='default fused')
    sub.add_argument('--rounds', type=COUNT, default=10, help='default %(default)s')
    add_machine_arguments(sub)
    add_peer_argument(sub)

    sub = commands.add_parser('backbone', help="timm's VOLO against this package's, the four stage maps")
    sub.set_defaults(prepare=with_stock(benchmark.BackboneCase), parser=sub)
    add_arch_argument(sub)
    add_network_options(sub)
    sub.add_argument('--timm', action='store_true', help="our side is timm's VOLO with use_fused_outlook")
    sub.add_argument(
        '--cuda-graph', action='store_true', help='every side as a CUDA graph, without the time of launches'
    )
    add_batch_arguments(sub, [1])
    add_peer_argument(sub)

    sub = commands.add_parser('train', help="a training step of stock mmseg with timm's VOLO against this package")
    sub.set_defaults(prepare=with_stock(benchmark.TrainCase), parser=sub)
    add_arch_argument(sub)
    sub.add_argument('--classes', type=COUNT, default=150, help='default %(default)s')
    sub.add_argument('--checkpointing', action='store_true', help='activation checkpointing, our side only')
    add_batch_arguments(sub, [2])
    add_peer_argument(sub)

    sub = commands.add_parser('saving', help="saving a checkpoint in training, mmengine's way against this package's")
    sub.set_defaults(prepare=with_stock(benchmark.SaveCase), parser=sub)
    add_arch_argument(sub)
    sub.add_argument('--classes', type=COUNT, default=150, help='default %(default)s')
    sub.add_argument('--interval', type=COUNT, default=16000, help='iterations between two; default %(default)s')
    sub.add_argument('--folder', default='.', metavar='DIR', help='on the disk that is measured; default here')
    add_batch_arguments(sub, [2])

    sub = commands.add_parser('models', help='VOLO-D1 beside Swin, ConvNeXt and SegFormer, with published ADE20K mIoU')
    sub.set_defaults(prepare=models, parser=sub)
    known = list(NETWORKS)
    sub.add_argument('--models', nargs='+', choices=known, default=known, metavar='MODEL', help=', '.join(known))
    sub.add_argument('--run', nargs='+', choices=RUNS, default=['logits'], help='default logits, in full size')
    add_batch_arguments(sub, [1, 16])
    add_peer_argument(sub)

    sub = commands.add_parser('validation', help='a validation with record and loss against one with IoUMetric alone')
    sub.set_defaults(run_alone=validation, parser=sub)
    sub.add_argument('--size', nargs=2, type=COUNT, default=[1024, 2048], metavar=('H', 'W'), help='default 1024 2048')
    sub.add_argument('--classes', type=COUNT, default=19, help='default %(default)s')
    sub.add_argument('--rounds', type=COUNT, default=9, help='default %(default)s')
    add_machine_arguments(sub)

    sub = commands.add_parser('suite', help='correctness, speed, profiles and a training run on a GPU, in one report')
    sub.set_defaults(run_alone=suite, parser=sub)
    names = [part.name for part in PARTS]
    sub.add_argument('--minutes', type=AMOUNT, default=9, help='for all of it; default %(default)s')
    sub.add_argument(
        '--parts', nargs='+', choices=names, default=names, metavar='PART', help=f'of {", ".join(names)}; default all'
    )
    sub.add_argument('--camvid', metavar='DIR', help='CamVid-11 to train on; default data/camvid if it exists')
    add_machine_arguments(sub)
    add_peer_argument(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(argv)
    args.device = args.device or get_device()
    command = shlex.join(['python', 'tools/benchmark.py', *argv])
    try:
        environment = benchmark.environment(args.device, args.threads)
        todo = None if hasattr(args, 'run_alone') else args.prepare(args)
    except ValueError as error:
        args.parser.error(str(error))
    print(f'$ {command}\n{benchmark.describe(environment)}', flush=True)
    if todo is None:
        return args.run_alone(args, environment, command)
    settings = Settings(args.rounds, not getattr(args, 'no_memory', False))
    benchmark.measure(todo, settings, Path(args.out), environment)


if __name__ == '__main__':
    run_tool(main)
