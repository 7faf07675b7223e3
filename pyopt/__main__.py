"""`python -m pyopt`: show the configuration; `python -m pyopt inspect FILE`: show what is in a file of pyopt.save."""

import argparse
import sys

from pyopt.config import show_config
from pyopt.files.inspecting import described


def main() -> int:
    """Do what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pyopt", description="Show the configuration, or what a file holds")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    inspect = commands.add_parser("inspect", help="show what is in a file of pyopt.save", description=described.__doc__)
    inspect.add_argument("file", help="the file")
    arguments = parser.parse_args()
    if arguments.command is None:
        show_config()
        return 0
    try:
        print(described(arguments.file))
    except (OSError, TypeError, ValueError, KeyError) as error:
        message = error.args[0] if isinstance(error, KeyError) else str(error)
        print(f"error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
