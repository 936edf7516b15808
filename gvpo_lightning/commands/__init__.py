"""Subcommands of `gvpo` beside Lightning's."""
