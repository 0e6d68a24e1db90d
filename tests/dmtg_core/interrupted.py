"""Helpers of tests that interrupt and resume runs."""

TIMES = ("seconds", "samples_per_second", "data_share")


def without_times(history):
    """Records without durations."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


class Interrupted(Exception):  # noqa: N818 - it is no error of the program
    """Raised in place of the end of a killed run."""


def interrupt_at(epoch: int):
    """A listener that kills the run before the checkpoint of an epoch is written."""

    def listen(record):
        if record["epoch"] == epoch:
            raise Interrupted

    return listen
