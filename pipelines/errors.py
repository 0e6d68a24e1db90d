"""The one error that a command shows to its user."""

from __future__ import annotations


class UserError(Exception):
    """Something that the user can mend.

    Args:
        what: What was found, with the name of the thing.
        where: The file, key or address it was found at.
        remedy: What to do about it.
        wrong_use: Whether the command was called wrongly (exit code 2) rather than failed (1).
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
        # raised in a Ray worker, it must arrive in the driver as what it is
        return _rebuild, (self.what, self.where, self.remedy, self.wrong_use)

    def to_dict(self) -> dict[str, str]:
        """The `error` object of `--json`."""
        return {"what": self.what, "where": self.where, "remedy": self.remedy}


def _rebuild(what: str, where: str, remedy: str, wrong_use: bool) -> UserError:
    return UserError(what, where=where, remedy=remedy, wrong_use=wrong_use)
