"""Start the command line: `python -m moebench`, and the program `moebench`.

The imports of the command line take a quarter of a second. Ctrl-C in this time ends like every other Ctrl-C.
"""

import sys

from moebench.errors import EXIT_INTERRUPTED


def main() -> None:
    """Import and run the command line. End with one line and the exit code of an interruption at Ctrl-C."""
    try:
        from moebench.cli import app

        app.main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
