"""Store and open rows of results, and show, compare and search the rows without giving a verdict."""
