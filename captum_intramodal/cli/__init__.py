r"""The command line: ``captum-intramodal demo``, ``explain``, ``check`` and ``evaluate``."""

from captum_intramodal.cli.commands import app, main

__all__ = ["app", "main"]
