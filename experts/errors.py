"""Define the errors of the experts package.

ExpertsError
├── ConfigError    an invalid configuration: field, value, rule and remedy in one line (also a ValueError)
├── InputError     tensors that do not fit the layer (also a ValueError)
├── RegistryError  an unknown name of a backend, engine or dispatcher (also a LookupError)
└── Unsupported    a valid request that this engine cannot run here; functions also return it as a value
"""


class ExpertsError(Exception):
    """The base class of all errors that this package raises on purpose."""


class ConfigError(ExpertsError, ValueError):
    """An invalid configuration."""


class InputError(ExpertsError, ValueError):
    """Tensors that do not fit the layer."""


class RegistryError(ExpertsError, LookupError):
    """A name of a backend, engine or dispatcher that is unknown or cannot be imported."""


class Unsupported(ExpertsError):
    """The reason why an engine cannot run something.

    Functions named `unsupported` return this error as a value. Functions that need the engine to run raise it.
    """

    @property
    def reason(self) -> str:
        return str(self)
