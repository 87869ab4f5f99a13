"""Define the command line. Each module has a group of commands; a command parses, calls one function and prints."""

from moebench.report.plots.settings import import_matplotlib

import_matplotlib()  # before another module imports it, with settings that the command line must not depend on
