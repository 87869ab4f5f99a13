"""Write numbers of bytes as text."""


def size(num_bytes: float, spec: str | None = None) -> str:
    """Return a number of bytes with a binary suffix, for example 1.23 GiB.

    The number has three significant digits, unless `spec` gives another format, for example ".0f".
    """
    for power, suffix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 2**power:
            scaled = num_bytes / 2**power
            digits = f".{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f"
            return f"{scaled:{spec or digits}} {suffix}"
    return f"{num_bytes:g} B"


def size_change(before: int, after: int) -> str:
    """Return two numbers of bytes as text, and their difference if the texts of both are equal."""
    one, two = size(before), size(after)
    return f"{one} -> {two}" if one != two else f"{one}, {abs(after - before)} B {'more' if after > before else 'less'}"
