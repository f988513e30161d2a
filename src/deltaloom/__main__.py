"""The command ``deltaloom``, also ``python -m deltaloom``."""

import sys

from deltaloom import __version__


def main() -> None:
    """Run the command line. ``--version`` is answered before any library is imported."""
    if sys.argv[1:] == ["--version"]:
        print(f"deltaloom {__version__}")
        return
    from deltaloom.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
