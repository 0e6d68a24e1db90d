"""Checks before workers start."""

from types import SimpleNamespace

import pytest

from dmtg_core import InputSpec, Task
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.training.checks import check_network

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
