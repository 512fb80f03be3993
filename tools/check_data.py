"""Check all files of a config's data sets before training: tools/check_data.py CONFIG.

Finds missing and broken files, images that are not used because of their names, or not read with all their bits or
bands, images and labels of different sizes, labels that do not fit the config, and images that two splits share.
Prints and plots how often each class occurs. For images that LoadBands reads, it prints the mean and deviation of each
channel over the training images. The exit status is 1 if there is a fault.
"""

import argparse
import csv
import json
import os
import signal
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

if __name__ == '__main__':  # the imports below take seconds: until run_tool, Ctrl-C ends the tool without a traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
from mmengine.registry import init_default_scope
from prettytable import PrettyTable

from mmseg_volo.cli import ConfigOptions, run_tool
from mmseg_volo.config_check import check_config
from mmseg_volo.datasets.checks.check import Finding, SplitReport
from mmseg_volo.datasets.checks.check import check_config as check_files
from mmseg_volo.utils.config import load_config
from mmseg_volo.utils.files import atomic_write

SHOWN = 3  # files per kind of fault


def positive(text: str) -> int:
    """Parse a number of processes; argparse reports the ValueError."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def print_findings(findings: Sequence[Finding]) -> None:
    kinds = defaultdict(list)
    for finding in findings:
        kinds['fault' if finding.fault else 'warning', finding.split, finding.kind].append(finding)
    for (level, split, kind), group in kinds.items():
        print(f'{level}: {split}: {kind} ({len(group)})')
        for finding in group[:SHOWN]:
            print(f'  {finding}')
        if len(group) > SHOWN:
            print(f'  ... and {len(group) - SHOWN} more, see --fix-report')


def balance(report: SplitReport) -> np.ndarray:
    """Return the share of each class in the labelled pixels (N,), in percent."""
    return 100 * report.pixels / max(report.pixels.sum(), 1)


def print_weights(report: SplitReport) -> None:
    """Print class weights that grow with a root of the inverse share of a class; the mean over all pixels is 1."""
    share = report.pixels / report.pixels.sum()
    print('for decode_head.loss_decode, to weigh rare classes more (a weight of 1 on average):')
    for name, root in (('fourth', 4), ('square', 2)):
        weights = np.divide(1, share ** (1 / root), out=np.ones(len(share)), where=share > 0)
        weights[share > 0] /= (share * weights).sum()
        print(f'  class_weight=[{", ".join(f"{weight:.3g}" for weight in weights)}]  # {name} root')


def print_classes(reports: Sequence[SplitReport]) -> None:
    """Print the pixels and images of each class in each split."""
    if not reports:
        return
    table = PrettyTable(['class', *(f'{r.split} {what}' for r in reports for what in ('pixels %', 'images'))])
    table.align, table.align['class'] = 'r', 'l'
    for i, name in enumerate(reports[0].classes):
        cells = ((f'{balance(r)[i]:.3f}', int(r.images[i])) for r in reports if i < len(r.pixels))
        table.add_row([name, *(cell for pair in cells for cell in pair)])
    print(table)


def print_statistics(report: SplitReport) -> None:
    """Print the mean and deviation of each channel, to be copied into a config."""
    found = report.statistics
    mean, std = ([float(f'{number:.6g}') for number in values] for values in (found.mean, found.deviation))
    print(
        f'mean and deviation of {len(mean)} channel{"s" * (len(mean) > 1)} over {report.measured} images '
        f'({int(found.count.max()):,} pixels with data):\n'
        f"  data_preprocessor=dict(type='BandsDataPreProcessor', bgr_to_rgb=False,\n    mean={mean},\n    std={std})"
    )


def plot_classes(reports: Sequence[SplitReport], path: Path) -> None:
    """Draw bars of the share of each class in the labelled pixels, with the splits side by side."""
    from matplotlib.figure import Figure  # slow to import

    names, height = reports[0].classes, 0.8 / len(reports)
    figure = Figure(figsize=(7, 1.2 + 0.16 * len(names) * (1 + len(reports))), layout='constrained')
    axes = figure.add_subplot()
    for i, report in enumerate(reports):
        axes.barh(np.arange(len(report.pixels)) + (i + 0.5) * height - 0.4, balance(report), height, label=report.split)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xscale('symlog', linthresh=0.01)
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 0.01, 0.1, 1, 10, 100], ['0', '0.01', '0.1', '1', '10', '100'])
    axes.margins(y=0.01)
    axes.set_xlabel('share of the labelled pixels (%)')
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_report(findings: Sequence[Finding], path: Path) -> None:
    """Write one line per finding: JSON for the suffixes .json and .jsonl, else CSV."""
    rows = [asdict(finding) for finding in findings]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part, part.open('w', newline='', encoding='utf-8') as file:
        if path.suffix in ('.json', '.jsonl'):
            file.writelines(json.dumps(row) + '\n' for row in rows)
        else:
            writer = csv.DictWriter(file, list(Finding.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--split', nargs='+', choices=['train', 'val', 'test'], help='default: all different splits')
    parser.add_argument('--fix-report', metavar='FILE', type=Path, help='write all findings as .jsonl or .csv')
    parser.add_argument('--plot', metavar='FILE', type=Path, help='default: work_dirs/CONFIG/check_data_SPLITS.png')
    parser.add_argument('--workers', type=positive, help='number of processes; default: one per CPU')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE', help='see train.py')
    args = parser.parse_args()

    config = load_config(args.config, args.cfg_options)
    init_default_scope(config.get('default_scope', 'mmseg'))
    check_config(config, 'data')
    reports = check_files(config, args.split, args.workers)
    findings = [finding for report in reports for finding in report.findings]
    for report in reports:
        print(f'{report.split}: {report.files} images, {report.labels} labels read')
        for reason in report.left_out:
            print(f'  not checked: {reason}')
    print_findings(findings)
    for report in reports:
        if report.split == 'train' and report.statistics is not None:
            print_statistics(report)
    counted = [report for report in reports if report.labels and report.classes]
    print_classes(counted)
    for report in counted:
        if report.split == 'train' and report.pixels.any():
            print_weights(report)
    if counted:
        plot = args.plot or Path(config.work_dir) / f'check_data_{"_".join(r.split for r in counted)}.png'
        plot_classes(counted, plot)
        print(f'class balance: {plot}')
    if args.fix_report:
        write_report(findings, args.fix_report)
        print(f'all findings: {args.fix_report}')
    faults = sum(finding.fault for finding in findings)
    print(f'{faults} faults, {len(findings) - faults} warnings')
    return int(faults > 0)


if __name__ == '__main__':
    run_tool(main)
