"""`heterostep` and `python -m heterostep`."""

import sys

from heterostep import interrupts


def main() -> int:
    """The command. Ctrl-C is one line and 130 from the first import on."""
    try:
        with interrupts.watched():
            from heterostep import cli

            return cli.main()
    except KeyboardInterrupt:
        print("heterostep: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
