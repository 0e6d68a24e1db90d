"""Errors of MLflow and its services, converted to errors for the user; and retries."""

from __future__ import annotations

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from pipelines import storage
from pipelines.errors import UserError, without_credentials
from pipelines.storage import Location

# packages whose errors MLflow raises
SERVICES = {"mlflow", "requests", "urllib3", "sqlalchemy", "alembic", "boto3", "botocore"}
logger = logging.getLogger(__name__)
T = TypeVar("T")


@contextlib.contextmanager
def reached(uri: str) -> Iterator[None]:
    """Convert errors of MLflow and the services behind it to one error that names the server.

    Args:
        uri: The tracking address.

    Raises:
        UserError: `storage.is_transient` of it is whether a retry can succeed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) or type(error).__name__ == "NoSuchModuleError":  # of SQLAlchemy
            name = getattr(error, "name", "") or without_credentials(str(error))
            raise UserError(
                f"the driver of this database is not installed: {name}",
                where=f"track.uri = {without_credentials(uri)}",
                remedy="install it, for example psycopg for postgresql:// or pymysql for "
                "mysql+pymysql://, or set track.uri to an MLflow server",
                wrong_use=True,
            ) from error
        if _service(error) not in SERVICES and not isinstance(error, OSError):
            raise
        unreachable = _unreachable(error)
        reason = without_credentials(str(error).partition("\n")[0])[:200]
        raise UserError(
            f"the tracking server {'does not answer' if unreachable else 'refuses'}: {reason}",
            where=f"track.uri = {without_credentials(uri)}",
            remedy="start it, correct track.uri, or set track.uri=none to go without",
        ) from (_transient(error, reason) if unreachable else error)


def _service(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _transient(error: Exception, reason: str) -> OSError:
    """An error that `storage.is_transient` recognises, in place of one that it does not."""
    known = OSError(errno.EHOSTUNREACH, reason)
    known.__cause__ = error
    return known


def _unreachable(error: Exception) -> bool:
    """Whether a server did not answer, or answered that it is unavailable."""
    from mlflow.exceptions import MlflowException, RestException

    response = getattr(error, "response", None)
    if isinstance(error, MlflowException):
        code = error.get_http_status_code()
        if code == 500 and not isinstance(error, RestException):  # MLflow uses it for errors of the client, too
            return str(error).startswith("API request to")
    elif isinstance(response, dict):  # the answer of an S3 server
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    else:
        code = getattr(response, "status_code", 0)
    if code:
        return bool(code >= 500 or code == 429)
    return _service(error) in SERVICES or storage.is_transient(error)


def retry_while_unreachable(call: Callable[[], T], run: Location, log: Callable[[str], None] = logger.info) -> T:
    """Publish a finished run to MLflow; retry for `storage.PATIENCE_S` while MLflow is unreachable.

    Args:
        call: Publishes the run. It can be called again after it has failed.
        run: The run folder.
        log: Called once, before the first retry.

    Returns:
        The result of `call`.

    Raises:
        UserError: It names the run folder and the command that publishes the run later.
    """
    until = time.monotonic() + storage.PATIENCE_S
    logged = False
    for pause in storage.retry_delays():
        try:
            return call()
        except UserError as error:
            if not storage.is_transient(error) or time.monotonic() + pause > until:
                raise not_published(error, run) from error
            if not logged:
                log(f"{error.what}; retrying for {storage.PATIENCE_S:.0f} s")
            logged = True
        time.sleep(pause)
    raise AssertionError


def not_published(error: UserError, run: Location) -> UserError:
    """The error of a run that is finished but not published to MLflow."""
    return UserError(
        f"training is done, its result and models are in {run}, but not all of it is in MLflow: {error.what}",
        where=error.where,
        remedy=f"correct it, then run dmtg models register {run}, or the same dmtg train command again",
        wrong_use=error.wrong_use,
    )
