"""Command line of the benchmarks: python -m bench COMMAND --help."""

from __future__ import annotations

import argparse
import sys

from bench import (
    difference_nce,
    gpu_check,
    instance_nce,
    losses,
    module_step,
    overhead,
    relation_nce,
    static,
)

COMMANDS = {
    "relation_nce": relation_nce,
    "instance_nce": instance_nce,
    "difference_nce": difference_nce,
    "module_step": module_step,
    "losses": losses,
    "overhead": overhead,
    "static": static,
    "gpu_check": gpu_check,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            description=module.__doc__,
            help=module.__doc__.split(": ", 1)[1],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        module.add_arguments(command)
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].main(options)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
