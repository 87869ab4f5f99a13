"""Tables for a terminal. Each is a rich renderable."""
