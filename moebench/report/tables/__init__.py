"""Tables for a terminal, each a rich renderable."""
