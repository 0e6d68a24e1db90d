"""What goes wrong on the way to MLflow, as the one error that a command shows; and trying again."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipelines import storage
from pipelines.errors import UserError
from pipelines.storage import Location

# what MLflow goes through
SERVICES = {"mlflow", "requests", "urllib3", "sqlalchemy", "alembic", "boto3", "botocore"}
CREDENTIALS = re.compile(r"(?<=://)[^/\s]+@")
SECRETS = re.compile(r"(?i)([?&][^=&\s]*(?:password|token|secret|key)[^=&\s]*)=[^&\s]+")
logger = logging.getLogger(__name__)
T = TypeVar("T")


def without_credentials(text: str) -> str:
    """An address, or a text that quotes some, without `user:password@` and without what `?token=` says."""
    return SECRETS.sub(r"\1=…", CREDENTIALS.sub("", text))


@contextlib.contextmanager
def reached(uri: str) -> Iterator[None]:
    """What MLflow, and the services behind it, raise, as one error that names the server.

    Args:
        uri: The tracking address.

    Raises:
        UserError: `storage.is_transient` tells of it whether the same may succeed a little later.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if _service(error) not in SERVICES and not isinstance(error, OSError):
            raise
        away = _away(error)
        reason = without_credentials(str(error).partition("\n")[0])[:200]
        raise UserError(
            f"the tracking server {'does not answer' if away else 'refuses'}: {reason}",
            where=f"track.uri = {without_credentials(uri)}",
            remedy="start it, correct track.uri, or set track.uri=none to go without",
        ) from (_passing(error, reason) if away else error)


def _service(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _passing(error: Exception, reason: str) -> OSError:
    """What `storage.is_transient` knows, for an error that it does not know."""
    known = OSError(errno.EHOSTUNREACH, reason)
    known.__cause__ = error
    return known


def _away(error: Exception) -> bool:
    """Whether a server did not answer, or said that it cannot at the moment."""
    from mlflow.exceptions import MlflowException, RestException

    response = getattr(error, "response", None)
    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
        if code == 500 and not isinstance(error, RestException):  # MLflow's word for any error on this side, too
            return str(error).startswith("API request to")
    elif isinstance(response, dict):  # that of an S3 server
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:
        code = getattr(response, "status_code", 0)
    if code:
        return bool(code >= 500 or code == 429)
    return _service(error) in SERVICES or storage.is_transient(error)


def patiently(call: Callable[[], T], run: Location, log: Callable[[str], None] = logger.info) -> T:
    """What `call` gives, which hands a finished run to MLflow; tried for a while where MLflow is away.

    Args:
        call: Can be called again when it got to its middle.
        run: The run folder.
        say: Told once that it has to be tried.

    Raises:
        UserError: That training is done, where its result is, and what registers it later.
    """
    until = time.monotonic() + storage.PATIENCE_S
    told = False
    for pause in storage.retry_delays():
        try:
            return call()
        except UserError as error:
            if not storage.is_transient(error) or time.monotonic() + pause > until:
                raise late(error, run) from error
            if not told:
                log(f"{error.what}; trying for {storage.PATIENCE_S:.0f} s more")
            told = True
        time.sleep(pause)
    raise AssertionError


def late(error: UserError, run: Location) -> UserError:
    """The error of a run that is finished, but not in MLflow."""
    return UserError(
        f"training is done, its result and models are in {run}, but not all of it is in MLflow: {error.what}",
        where=error.where,
        remedy=f"when that is mended: dmtg models register {run}; the same dmtg train words do it too",
        wrong_use=error.wrong_use,
    )
