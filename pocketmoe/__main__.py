"""Where the process begins: `python -m pocketmoe`, and the console script.

Signals are looked after before the command line is imported, which takes long enough for a Ctrl-C to meet it.
"""

import sys

from pocketmoe import process


def main() -> None:
    """Run the command line and leave with its exit code."""
    process.leave_on_signals()
    process.open_missing_streams()
    problem = process.unsuited()
    if problem:
        sys.stderr.write(f"Error: {problem}\n")
        sys.exit(3)
    from pocketmoe.cli import main as commands

    commands()


if __name__ == "__main__":
    main()
