"""Contract with Ray: each private name that the adapter uses exists with the expected signature."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.paths import ROOT

PACKAGE = ROOT / "pipelines" / "training" / "ray"
ADAPTER = PACKAGE / "adapter.py"
PRIVATE = "ray.train.v2._internal"

CALLBACK = f"{PRIVATE}.execution.callback.ControllerCallback"
CONTEXT = f"{PRIVATE}.execution.context.TrainRunContext"
CONTROLLER = f"{PRIVATE}.execution.controller.controller.TrainController"
ERRORS = f"{PRIVATE}.exceptions"
GROUP = f"{PRIVATE}.execution.worker_group.WorkerGroup"
STATE = f"{PRIVATE}.execution.worker_group.state.WorkerGroupState"
TRAINER = "ray.train.torch.TorchTrainer"

RETRY = "retrying a loss of workers between their start and that of training"
SETUP = "giving the controller its worker group before it starts workers"
ABORT = "freeing the workers of a process that exits"
SIGINT = "leaving Ctrl-C to the command"
DRAIN = "replacing the workers of a drained machine at once"
TIMEOUT = "telling a timeout of Ray's collectives from an error of training"

NAMES = {  # name → why it is needed
    GROUP: RETRY,
    f"{GROUP}._start": RETRY,
    f"{GROUP}.has_started": RETRY,
    f"{STATE}.shutdown": RETRY,
    CONTROLLER: SETUP,
    f"{CONTROLLER}.worker_group_cls": SETUP,
    CALLBACK: SETUP,
    f"{CALLBACK}.after_controller_start": SETUP,
    f"{CONTROLLER}.abort": ABORT,
    f"{CONTROLLER}._is_training_succeeded": DRAIN,
    f"{TRAINER}._register_sigint_handler": SIGINT,
    f"{ERRORS}.CollectiveTimeoutError": TIMEOUT,
    f"{ERRORS}.BroadcastCollectiveTimeoutError": TIMEOUT,
    f"{ERRORS}.WorkerHealthCheckFailedError": "finding the cause of a failure that a health check wraps",
}
SIGNATURES = {  # function → parameters
    f"{GROUP}._start": ["self"],
    f"{GROUP}.has_started": ["self"],
    f"{STATE}.shutdown": ["self"],
    f"{CALLBACK}.after_controller_start": ["self", "train_run_context"],
    f"{CONTROLLER}.abort": ["self"],
    f"{CONTROLLER}._is_training_succeeded": ["worker_group_status"],
    f"{TRAINER}._register_sigint_handler": ["self", "controller"],
    "ray.train.UserCallback.after_report": ["self", "run_context", "metrics", "checkpoint"],
    "ray.train.UserCallback.after_exception": ["self", "run_context", "worker_exceptions"],
    "ray.train.WorkerGroupError.__init__": ["self", "error_message", "worker_failures"],
}
SOURCES = {  # function, text in its source → why it is needed
    (f"{GROUP}.__init__", "self._worker_group_state"): RETRY,
    (f"{GROUP}.__init__", "self._train_run_context = train_run_context"): RETRY,
    (f"{GROUP}.create", "._start()"): RETRY,
    (f"{GROUP}.has_started", "self._worker_group_state is not None"): RETRY,
    (CONTEXT, "run_config: RunConfig"): RETRY,
    (CONTROLLER, "self.worker_group_cls.create("): SETUP,
    (CONTROLLER, "after_controller_start"): SETUP,
    (CONTROLLER, "if self._is_training_succeeded(worker_group_status):"): DRAIN,
    (CONTROLLER, "if worker_group_status.finished or deadline_exceeded:"): DRAIN,
    (f"{PRIVATE}.execution.worker_group.poll.WorkerGroupPollStatus", "worker_statuses: Dict[int,"): DRAIN,
    (f"{PRIVATE}.execution.worker_group.poll.WorkerStatus", "return_value: Any"): DRAIN,
    (TRAINER, "_register_sigint_handler(controller)"): SIGINT,
    (f"{GROUP}._poll_workers_and_collect_errors", "health check has been hanging"): "reporting a hanging worker",
    (f"{ERRORS}.WorkerHealthCheckFailedError", "self.health_check_failure = failure"): "finding a failure's cause",
    (
        "ray.train.ControllerError.__init__",
        "self.controller_failure = controller_failure",
    ): "finding a failure's cause",
    ("ray.train.WorkerGroupError.__init__", "self.worker_failures = worker_failures"): "finding a failure's cause",
}
VARIABLES = {  # environment variable → its constant
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "COLLECTIVE_TIMEOUT_S_ENV_VAR",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "HEALTH_CHECK_INTERVAL_S_ENV_VAR",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "ENABLE_PRINT_PATCH_ENV_VAR",
}


def find(name: str, why: str) -> Any:
    """The object of a dotted name; a failure that says which part of the name is missing."""
    parts = name.split(".")
    found: Any = None
    where = parts[0]
    for i, part in enumerate(parts):
        where = ".".join(parts[:i])
        try:
            found = importlib.import_module(".".join(parts[: i + 1]))
        except ModuleNotFoundError:
            if not hasattr(found, part):
                pytest.fail(f"{where} has no attribute {part}, needed for {why}")
            found = getattr(found, part)
    return found


def source(found: Any) -> str:
    """The source of a function, or of a class and its bases in Ray."""
    if not inspect.isclass(found):
        return inspect.getsource(found)
    return "".join(inspect.getsource(one) for one in found.__mro__ if one.__module__.startswith("ray."))


@pytest.mark.parametrize("name", NAMES)
def test_a_private_name_exists(name: str) -> None:
    find(name, NAMES[name])


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_function_has_the_expected_parameters(name: str) -> None:
    expected = SIGNATURES[name]
    found = list(inspect.signature(find(name, NAMES.get(name, "callbacks and errors"))).parameters)
    found = [parameter for parameter in found if parameter != "_ray_trace_ctx"]  # added when an actor is started
    assert found == expected, f"{name} has the parameters {found}, the adapter expects {expected}"


@pytest.mark.parametrize(("name", "text"), SOURCES)
def test_ray_uses_a_name_as_expected(name: str, text: str) -> None:
    why = SOURCES[name, text]
    assert text in source(find(name, why)), f"the source of {name} has no {text!r}, needed for {why}"


@pytest.mark.parametrize("variable", VARIABLES)
def test_an_environment_variable_has_the_expected_name(variable: str) -> None:
    name = f"{PRIVATE}.constants.{VARIABLES[variable]}"
    found = find(name, f"setting {variable}")
    assert found == variable, f"{name} is {found}, DMTG sets {variable}"


def test_a_controller_creates_the_worker_group_that_the_adapter_replaces() -> None:
    controller, group = find(CONTROLLER, SETUP), find(GROUP, SETUP)
    found = controller.worker_group_cls
    assert found is group, f"{CONTROLLER}.worker_group_cls is {found}, the adapter subclasses {group}"


def test_a_timeout_of_a_broadcast_is_a_timeout_of_a_collective() -> None:
    base = find(f"{ERRORS}.CollectiveTimeoutError", TIMEOUT)
    assert issubclass(find(f"{ERRORS}.BroadcastCollectiveTimeoutError", TIMEOUT), base), (
        f"BroadcastCollectiveTimeoutError is not a {base}, needed for {TIMEOUT}"
    )


def test_a_missing_name_is_named_with_what_needs_it() -> None:
    with pytest.raises(
        pytest.fail.Exception, match=r"worker_group\.WorkerGroup has no attribute _begin, needed for x"
    ):
        find(f"{GROUP}._begin", "x")


# ---------------------------------------------------------------- a drained machine


@pytest.mark.parametrize(
    ("running", "error", "returned", "finished"),
    [
        (False, None, "", True),
        (True, None, None, False),
        (False, ValueError("wrong"), None, False),
        (False, None, "stopped: a machine is being drained", False),
    ],
)
def test_workers_that_stop_for_a_drained_machine_have_not_finished(
    running: bool, error: Exception | None, returned: str | None, finished: bool
) -> None:
    from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

    from pipelines.training.ray.adapter import is_finished

    first = WorkerStatus(running=False, return_value="")
    second = WorkerStatus(running=running, error=error, return_value=returned)
    assert is_finished(WorkerGroupPollStatus({0: first, 1: second})) is finished


# ---------------------------------------------------------------- a start that fails


def callback(reported: list[str]) -> Any:
    """A callback that reports connection errors only."""
    from pipelines.training.ray.adapter import StartFailureCallback

    class Callback(StartFailureCallback):
        def after_start_failure(self, error: Exception) -> str:
            if not isinstance(error, ConnectionError):
                return ""
            reported.append(str(error))
            return str(error)

    return Callback()


@pytest.mark.parametrize(
    ("error", "started", "raised", "freed"),
    [
        (ConnectionError("lost"), True, "WorkerGroupError", True),
        (ConnectionError("lost"), False, "ConnectionError", False),
        (ValueError("wrong"), True, "ValueError", True),
    ],
)
def test_a_failed_start_frees_the_workers_and_is_retried_if_they_were_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception, started: bool, raised: str, freed: bool
) -> None:
    from pipelines.training.ray import adapter

    def fail(group: Any) -> None:
        raise error

    monkeypatch.setattr(adapter.WorkerGroup, "_start", fail)
    reported: list[str] = []
    shutdowns: list[int] = []
    group = object.__new__(adapter.RetriableWorkerGroup)
    state = SimpleNamespace(shutdown=lambda: shutdowns.append(1))
    group._worker_group_state = state if started else None
    run_config = SimpleNamespace(callbacks=[object(), callback(reported)])
    group._train_run_context = SimpleNamespace(run_config=run_config)
    with pytest.raises(Exception, match="lost|wrong") as found:
        group._start()
    assert type(found.value).__name__ == raised
    assert bool(shutdowns) is freed
    assert reported == (["lost"] if raised == "WorkerGroupError" else [])


# ---------------------------------------------------------------- the imports of this project


def imports(file: Path) -> set[str]:
    """The modules that a file imports anywhere, and the names from modules as `module.name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def importers(matches: Callable[[str], bool]) -> set[Path]:
    files = [file for package in ("pipelines", "dmtg_core", "bench") for file in (ROOT / package).rglob("*.py")]
    return {file for file in files if any(matches(name) for name in imports(file))}


def test_every_private_import_of_the_adapter_has_a_case_here() -> None:
    private = {name for name in imports(ADAPTER) if "._internal" in name}
    assert private
    assert private <= set(NAMES)


def test_only_the_adapter_imports_private_modules_of_ray() -> None:
    assert importers(lambda name: name.startswith("ray.") and "._" in name) == {ADAPTER}


def test_only_the_package_for_ray_train_imports_it() -> None:
    found = importers(lambda name: name == "ray.train" or name.startswith("ray.train."))
    assert {file.parent for file in found} == {PACKAGE}
