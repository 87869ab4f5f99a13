"""Where the command line prints: results on standard output, messages on standard error."""

from rich.console import Console

out = Console(highlight=False, soft_wrap=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
