"""The command line: each command is a public function of the library, with its arguments as options."""

from subbyte.cli.program import main

__all__ = ["main"]
