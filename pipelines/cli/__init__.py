"""The `dmtg` command: one module for each group of commands, the options and the output."""

from importlib.metadata import PackageNotFoundError, version


def versions() -> list[str]:
    """The installed versions of dmtg and of the packages that decide its results; none of them is imported."""
    found = []
    for name in ("dmtg", "torch", "ray", "mlflow"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
