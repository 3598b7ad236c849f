"""The `kvfold` command."""

from kvfold.cli.app import main

__all__ = ["main"]
