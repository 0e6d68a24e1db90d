"""What kills a run in a test, and what two runs that ended alike have in common."""

TIMES = ("seconds", "samples_per_second", "data_share")


def without_times(history):
    """Records without what a clock says."""
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


class Interrupted(Exception):  # noqa: N818 - it is no error of the program
    """What a killed run raises here."""


def interrupt_at(epoch: int):
    """A listener that kills the run before the checkpoint of an epoch is written."""

    def listen(record):
        if record["epoch"] == epoch:
            raise Interrupted

    return listen
