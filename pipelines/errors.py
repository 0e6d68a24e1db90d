"""The error that a command shows to its user."""

from __future__ import annotations


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
            f"{label}: {text}"
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
