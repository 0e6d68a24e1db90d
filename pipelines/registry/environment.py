"""Settings of MLflow that are read from the environment."""

from __future__ import annotations

import os
import sys


def mlflow_environment() -> None:
    """Set defaults of MLflow's environment variables; call it before the first use of MLflow in a process."""
    settings = {
        # an unreachable server is found in seconds, not after MLflow's default of many retries
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK": "true",
        # in a log file, a progress bar for every download would hide the messages
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": str(sys.stderr.isatty()).lower(),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
