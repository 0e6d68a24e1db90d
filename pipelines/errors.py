"""The error that a command shows to its user, and the form of a text that is safe to show."""

from __future__ import annotations

import re

# what is before the @ of an address of Azure is the container, unless it has a colon
AZURE = ("abfs://", "abfss://", "wasb://", "wasbs://")
CREDENTIALS = re.compile(
    rf"(?<=://){''.join(f'(?<!{scheme})' for scheme in AZURE)}[^/\s]+@"
    + "".join(rf"|(?<={scheme})[^/\s@]*:[^/\s]*@" for scheme in AZURE)
)
SECRETS = re.compile(r"(?i)([?&][^=&\s]*(?:password|token|secret|key)[^=&\s]*)=[^&\s]+")
LONGEST = 2000  # characters of a line: a name can be a whole file
# control characters, line and paragraph separators, and marks that change the direction of a text
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def without_credentials(text: str) -> str:
    """An address, or a text with addresses, without `user:password@` and secrets in its query."""
    return SECRETS.sub(r"\1=…", CREDENTIALS.sub("", text))


def printable(text: str) -> str:
    """A text for one line of a log or terminal: characters that could change other lines are escaped."""
    return UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


class UserError(Exception):
    """An error that the user can correct.

    Args:
        what: The problem, with the name of what is affected.
        where: The file, configuration key or address of the problem.
        remedy: How to correct it.
        wrong_use: Whether the command was called wrongly (exit code 2) or failed (exit code 1).
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "", wrong_use: bool = False) -> None:
        super().__init__(what, where, remedy, wrong_use)
        self.what = what
        self.where = where
        self.remedy = remedy
        self.wrong_use = wrong_use

    def __str__(self) -> str:
        return "\n".join(
            f"{label}: {printable(text)[:LONGEST]}"
            for label, text in (("what", self.what), ("where", self.where), ("remedy", self.remedy))
            if text
        )

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        # the error of a Ray worker must arrive in the driver with its class and fields
        return _rebuild, (self.what, self.where, self.remedy, self.wrong_use)

    def to_dict(self) -> dict[str, str]:
        """The `error` object of the `--json` output."""
        return {"what": self.what, "where": self.where, "remedy": self.remedy}


def _rebuild(what: str, where: str, remedy: str, wrong_use: bool) -> UserError:
    return UserError(what, where=where, remedy=remedy, wrong_use=wrong_use)
