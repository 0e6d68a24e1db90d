"""Code of other packages by its address, `package.module:name`, or by the short name of an entry point.

An address in a configuration is imported because its user wrote it. An address in a file that came from elsewhere
(the manifest of shards, a checkpoint, a registered model) is only a text: it is imported if the user has allowed
it, see `allow_code`. What is imported is recorded, so that other code under the same address is recognised.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import distribution, entry_points, packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# kind of code → group of its entry points; kinds without a group have no short names
GROUPS: Mapping[str, str] = {
    "encoder": "dmtg.encoders",
    "source": "dmtg.sources",
    "loss": "dmtg.losses",
    "metric": "dmtg.metrics",
}
FORM = "package.module:name"
PATTERN = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$"


class CodeError(ValueError):
    """Code of an address cannot be used: it is missing, is other code than recorded, or may not be imported.

    Args:
        problem: What was found.
        remedy: How to correct it.
    """

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.problem}; {self.remedy}"


@dataclass(frozen=True)
class Code:
    """What is recorded of code: its address, the package that has it, and the SHA-256 of its source file.

    Args:
        kind: What it is: a key of `GROUPS`, "aggregator" or "method".
        address: `package.module:name`.
        distribution, version: The installed package; empty for a module that belongs to none.
        sha256: Digest of the file of the module.
    """

    kind: str
    address: str
    distribution: str = ""
    version: str = ""
    sha256: str = ""

    @property
    def package(self) -> str:
        """The package as a requirement of pip, or the module."""
        if self.distribution:
            return f"{self.distribution}=={self.version}"
        return f"the module {self.address.partition(':')[0]}"

    def to_dict(self) -> dict[str, str]:
        """Return the fields ready for JSON."""
        return asdict(self)

    @classmethod
    def of_stored(cls, values: Mapping[str, Any]) -> Code:
        """The inverse of `to_dict`; unknown fields of later versions are ignored."""
        return cls(**{name: str(values.get(name, "")) for name in cls.__dataclass_fields__})


_allowed: dict[str, bool] = {}  # address → whether code that differs from its record may be used
_loaded: dict[str, tuple[Any, Code]] = {}


def is_address(name: str) -> bool:
    """Whether a name has the form of an address.

    Example:
        >>> is_address("my_package.losses:log_cosh"), is_address("mse"), is_address("s3://bucket")
        (True, False, False)
    """
    return re.fullmatch(PATTERN, name) is not None


def short_names(kind: str) -> dict[str, str]:
    """Return short name → address of all entry points of a kind."""
    return _points(GROUPS[kind], tuple(sys.path)) if kind in GROUPS else {}


@lru_cache
def _points(group: str, _path: tuple[str, ...]) -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=group)}


def full_name(kind: str, name: str, known: Iterable[str] = ()) -> str:
    """Return the address of a short name. An own name (one of `known`), an address and any other name stay."""
    return name if name in known or is_address(name) else short_names(kind).get(name, name)


def checked_name(kind: str, name: str, known: Iterable[str], where: str = "") -> str:
    """Return an own name as it is, and the address of any other name. Nothing is imported.

    Args:
        kind: As for `Code`.
        name: One of `known`, an address, or the short name of an entry point.
        known: Our own names.
        where: Beginning of the message.

    Raises:
        ValueError: For any other name. The message lists the names that are known.
    """
    known = tuple(known)
    found = full_name(kind, name, known)
    if found in known or is_address(found):
        return found
    raise ValueError(
        f"{where}unknown {kind} {name!r}, expected one of {', '.join([*known, *short_names(kind)])}, or {FORM}"
    )


def allow_code(*addresses: str, changed: bool = False) -> None:
    """Allow the import of some addresses in this process.

    Args:
        addresses: Addresses. Names of another form have no effect.
        changed: Use code that differs from what a checkpoint or a model records, too.
    """
    for address in filter(is_address, addresses):
        _allowed[address] = changed or _allowed.get(address, False)


def is_allowed(address: str) -> bool:
    """Whether an address may be imported."""
    return address in _allowed


def load(kind: str, address: str) -> Any:
    """Return the object at an address. Its module is imported the first time.

    Raises:
        CodeError: If the address is not allowed, or if it cannot be imported.
    """
    if address not in _allowed:
        raise _not_allowed(Code(kind, address))
    if address not in _loaded:
        found = installed(Code(kind, address))  # before the import, which can change files
        _loaded[address] = (_imported(kind, address), found)
    return _loaded[address][0]


def recorded(kind: str, address: str) -> Code:
    """Return the record of code: as it was imported, or as it is installed.

    Raises:
        CodeError: If it is not installed.
    """
    held = _loaded.get(address)
    return held[1] if held is not None and held[1].kind == kind else installed(Code(kind, address))


def check_code(needed: Iterable[tuple[str, str]], records: Iterable[Mapping[str, Any]], *, trust: bool) -> None:
    """Check the code of a stored file before any of it is imported.

    Args:
        needed: Kind and address of all code.
        records: `Code.to_dict` of the code when the file was written. Code without a record has any version.
        trust: Allow the code, also if it differs from its record.

    Raises:
        CodeError: If code is missing, if it is not the recorded code, or if it may not be imported.
    """
    known = {(code.kind, code.address): code for code in map(Code.of_stored, records)}
    for kind, address in needed:
        expected = known.get((kind, address), Code(kind, address))
        found = installed(expected)
        if trust:
            allow_code(address, changed=True)
        if expected.sha256 and found.sha256 != expected.sha256:
            _differs(expected, found)
        if address not in _allowed:
            raise _not_allowed(expected)


def _differs(expected: Code, found: Code) -> None:
    what = (
        f"{found.kind} {found.address} is other code than at training: it was {expected.package} (SHA-256 "
        f"{expected.sha256[:12]}), installed is {found.package} ({found.sha256[:12]})"
    )
    if not _allowed.get(found.address):
        install = f"install {expected.package}" if expected.distribution else "put the file back"
        raise CodeError(what, f"{install}, or use the installed code with --trust-code (run.trust_code=true)")
    log.warning("%s; it is used because the code is trusted", what)


def _not_allowed(code: Code) -> CodeError:
    package = f" of {code.package}" if code.distribution else ""
    return CodeError(
        f"{code.kind} {code.address}{package} is code that the configuration does not name, so it is not imported",
        "--trust-code imports it (in a configuration run.trust_code=true, or the same address; in Python "
        f"dmtg_core.allow_code({code.address!r}))",
    )


def installed(expected: Code) -> Code:
    """Return the record of installed code. Nothing is imported.

    Raises:
        CodeError: If there is no such module; it names the package of `expected`.
    """
    module = expected.address.partition(":")[0]
    file = _file_of(module)
    if file is None:
        remedy = f"pip install '{expected.package}'" if expected.distribution else (
            f"install the package that has {module}, or put it on the Python path"
        )  # fmt: skip
        raise CodeError(f"{expected.kind} {expected.address} is not installed here", remedy)
    name, version = _distribution(module, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Code(expected.kind, expected.address, name, version, digest)


def _file_of(module: str) -> Path | None:
    """The file of a module. `find_spec` of a submodule would import its packages."""
    top, *inner = module.split(".")
    found = _top(top)
    for part in inner:
        places = list(found.submodule_search_locations or ()) if found is not None else []
        # without the names of its packages: those of a namespace would have to be imported
        found = PathFinder.find_spec(part, places)
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _top(name: str) -> ModuleSpec | None:
    try:
        return find_spec(name)
    except ValueError:  # a module without a spec, such as `__main__`
        return None


def _distribution(module: str, file: Path) -> tuple[str, str]:
    """Name and version of the package that a module belongs to; empty for none."""
    names = list(dict.fromkeys(_distributions(tuple(sys.path)).get(module.partition(".")[0], ())))
    for name in names:
        held = distribution(name)
        if len(names) == 1 or any(Path(str(held.locate_file(one))) == file for one in held.files or ()):
            return held.metadata["Name"], held.version
    return "", ""


@lru_cache
def _distributions(_path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Top-level module → packages. Finding them reads a file of each installed package."""
    return packages_distributions()


def _imported(kind: str, address: str) -> Any:
    module, _, path = address.partition(":")
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # a module runs any code
        raise CodeError(
            f"{kind} {address} cannot be imported: {type(error).__name__}: {error}",
            "correct the address or its code",
        ) from error
    if not callable(found):
        raise CodeError(
            f"{kind} {address} is a {type(found).__name__}, expected a function or a class", "correct the address"
        )
    log.info("imported %s %s from %s", kind, address, sys.modules[module].__file__)
    return found
