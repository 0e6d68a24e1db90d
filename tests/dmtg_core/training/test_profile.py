"""A profile of training steps."""

import gzip
import json

import pytest

from dmtg_core import ArrayData, TrainSettings
from dmtg_core.training.checkpoint import read_json
from dmtg_core.training.profile import OPERATORS, PARTS, SHARES, TRACE, profile_steps
from tests.dmtg_core import samples
from tests.dmtg_core.samples import mlp_spec
from tests.dmtg_core.training.test_step import local


def test_a_profile_has_a_trace_a_table_and_shares_that_sum_to_1(tmp_path):
    spec = mlp_spec()
    data = samples.data(spec.input, spec.tasks, 40)  # three batches an epoch, fewer than requested
    settings = TrainSettings(batch_size=16, clip_norm=1.0)
    found = profile_steps(spec, data, settings, local(), tmp_path, warm_up=2, steps=4)
    assert read_json(tmp_path / SHARES) == json.loads(json.dumps(found))
    assert set(found["shares"]) == {*PARTS, "other"}
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert min(found["shares"][part] for part in PARTS) > 0
    trace = json.loads(gzip.decompress((tmp_path / TRACE).read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert [names.count(part) for part in ("data", "forward", "backward")] == [4, 4, 4]
    assert any("_fused_adam_" in str(name) for name in names)
    # the table holds the slowest operators alone, and which these are depends on the machine
    table = (tmp_path / OPERATORS).read_text()
    assert "Self CPU" in table
    assert "aten::" in table


def test_waiting_for_data_is_in_the_profile(tmp_path):
    spec = mlp_spec()

    class Slow(ArrayData):
        def train(self, epoch, batch_size, start=0):
            for batch in super().train(epoch, batch_size, start):
                for _ in range(30):  # far more work than the step of so small a network
                    batch.inputs.new_ones(300, 300) @ batch.inputs.new_ones(300, 300)
                sum(range(300_000))
                yield batch

    quick = samples.data(spec.input, spec.tasks, 40)
    shares = [
        profile_steps(spec, data, TrainSettings(batch_size=16), local(), tmp_path, warm_up=1, steps=3)["shares"]
        for data in (quick, Slow(quick.splits, spec.tasks))
    ]
    assert shares[0]["data"] < shares[1]["data"] > 0.3
