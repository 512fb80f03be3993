"""Print parameters and multiply-adds of VOLO-D1...D5 beside the paper's: tools/complexity.py [--size 224]."""

import argparse

from mmseg_volo.benchmark.complexity import table


def main() -> None:
    parser = argparse.ArgumentParser(description='Parameters and multiply-adds, counted as the VOLO paper counts them.')
    parser.add_argument('--size', type=int, default=224, help='side of the image in pixels, a multiple of 16')
    args = parser.parse_args()
    try:
        print(table(args.size))
    except ValueError as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
