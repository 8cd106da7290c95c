"""``python -m tersor`` is the ``tersor`` command."""

from tersor.cli.main import entry

if __name__ == "__main__":
    entry()
