"""`heterostep` and `python -m heterostep`."""

import sys

from heterostep import interrupts


def main() -> int:
    """The command. Ctrl-C is one line and 130 from the first import on."""
    try:
        with interrupts.watched():
            from heterostep import cli

            code = cli.main()
    except KeyboardInterrupt:
        print("heterostep: interrupted", file=sys.stderr)
        code = 130
    # Python ends itself by the signal, whatever the code, where what it last ran from a string was interrupted, such as
    # a dataclass in the making. Now that is this.
    eval("None")
    return code


if __name__ == "__main__":
    sys.exit(main())
