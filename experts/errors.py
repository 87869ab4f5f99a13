"""Errors of the experts package.

ExpertsError
├── ConfigError    a configuration that cannot be: field, value, rule, remedy in one line (also a ValueError)
├── InputError     tensors that do not fit the layer (also a ValueError)
├── RegistryError  a backend name that leads nowhere (also a LookupError)
└── Unsupported    right in itself, but this engine cannot do it here; also a value that says why
"""


class ExpertsError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(ExpertsError, ValueError):
    """A configuration that cannot be."""


class InputError(ExpertsError, ValueError):
    """Tensors that do not fit the layer."""


class RegistryError(ExpertsError, LookupError):
    """A backend name that leads nowhere."""


class Unsupported(ExpertsError):
    """Why an engine cannot run something. Returned where support is asked for, raised where it is needed."""

    @property
    def reason(self) -> str:
        return str(self.args[0])
