"""The `heterostep` command: one file a command, and what they share in `options`."""

from heterostep.cli.app import app, main

__all__ = ["app", "main"]
