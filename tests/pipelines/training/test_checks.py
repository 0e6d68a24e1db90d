"""Checks before workers start."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dmtg_core import InputSpec, Task
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.execution.choice import open_executor
from pipelines.training.checks import check_network, folder_of_data, open_folder

TOKENS = SimpleNamespace(description=SimpleNamespace(input=InputSpec("tokens", (6,), "int32", vocabulary=9)))


def text(batched: str, dropout: float, groups: int = 2) -> Config:
    options = {"width": 8, "heads": 2, "layers": 2, "dropout": dropout}
    network = {"encoder": "text_transformer", "stem": 1, "groups": groups, "options": options}
    return Config.model_validate(
        {"name": "x", "data": {"shards": "s"}, "network": network | {"batch_branches": batched}}
    )


def test_branches_that_do_not_fit_one_pass_are_named_before_training():
    with pytest.raises(UserError, match=r"do not fit one pass: .*self_attn.* draws random numbers") as found:
        check_network(text("on", 0.1), TOKENS, (Task("a", "binary"),))
    assert found.value.where == "network"
    for config in (text("on", 0.0), text("auto", 0.1), text("off", 0.1), text("on", 0.1, groups=1)):
        check_network(config, TOKENS, (Task("a", "binary"),))


def test_one_session_creates_the_shards_and_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[str] = []

    def created(config: Config, log: object) -> SimpleNamespace:
        with open_executor(config.ray) as executor:
            calls.append(executor.name)
        return SimpleNamespace(digest=lambda: "0")

    monkeypatch.setattr("ray.init", lambda **_: calls.append("start"))
    monkeypatch.setattr("ray.is_initialized", lambda: calls.count("start") > calls.count("end"))
    monkeypatch.setattr("ray.shutdown", lambda: calls.append("end"))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8})
    monkeypatch.setattr("pipelines.training.checks.ready_shards", lambda *_: None)
    monkeypatch.setattr("pipelines.training.checks.renew_shards", created)
    values = {"name": "x", "data": {"shards": "s"}, "run": {"root": str(tmp_path)}, "ray": {"executor": "ray"}}
    config = Config.model_validate(values)
    with folder_of_data(config, *open_folder(config, "x"), 2, print), open_executor(config.ray):
        calls.append("trained")
    assert calls == ["start", "Ray", "trained", "end"]
