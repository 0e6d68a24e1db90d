"""Outputs of a frozen stem beside the shards: computed once, resumed, checked, and used by training."""

import numpy as np
import pytest
import torch

from dmtg_core.network.grouping_network import GroupingNetwork
from pipelines.config.loading import load_config
from pipelines.data import stem_outputs
from pipelines.data.ingest import open_data
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.data.shards import shard
from pipelines.data.stem_outputs import FOLDER, with_outputs
from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.training.driver import train

FROZEN = ["network.encoder=mlp", "network.options={widths: [12, 8, 6]}", "network.stem=2", "network.branch=lora",
          "network.adapter.rank=2"]  # fmt: skip

pytestmark = pytest.mark.usefixtures("plain_reports")


@pytest.fixture
def planted(tmp_path):
    """A configuration with a frozen stem, and a reader of its shards in several files."""
    config = load_config(
        "planted",
        [f"data.shards={tmp_path}/shards", f"run.root={tmp_path}/runs", "track.uri=none", "train.epochs=3",
         "source.options={tasks: 4, groups: 2, features: 8, rows: 600, seed: 0}", "data.rows_per_shard=100",
         "ray.executor=embedded", "network.groups=2", "train.trees=false", *FROZEN],
    )  # fmt: skip
    shard(config)
    folder = locate(config.data.shards)
    manifest = read_manifest(folder)
    return config, Reader(folder, manifest, manifest.description.tasks)


def changed(config, **data):
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def test_outputs_are_those_of_the_stem(planted, monkeypatch):
    config, reader = planted
    monkeypatch.setattr(stem_outputs, "GROUP_BYTES", 2_000)  # several row groups in a shard
    found = with_outputs(config, reader, None)
    network = GroupingNetwork(config.network_spec(reader.manifest.description.input, reader.tasks)).eval()
    for file in reader.manifest.files():
        raw, outputs = reader.arrays(reader.table(file)), found.arrays(found.table(file))
        expected = network.stored_output(torch.from_numpy(np.array(raw.inputs)))
        assert torch.equal(torch.from_numpy(np.array(outputs.inputs)).view(torch.bfloat16), expected)
        assert outputs.outputs
        for name, labels in raw.labels.items():
            np.testing.assert_array_equal(outputs.labels[name], labels)


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_streamed_and_held_outputs_are_the_same_samples(planted, cache, monkeypatch):
    config, reader = planted
    monkeypatch.setattr(stem_outputs, "GROUP_BYTES", 2_000)
    found = with_outputs(config, reader, None)
    section = changed(config, cache=cache).data
    held = None if cache == "stream" else _held(found)
    data = open_data(found, held, section, seed=1, rank=0, world_size=1, device=torch.device("cpu"))
    rows = torch.cat([batch.inputs for batch in data.train(0, 50)])
    assert rows.dtype == torch.bfloat16
    whole = np.concatenate([found.arrays(found.table(s.file)).inputs for s in found.manifest.shards["train"]])
    mine = rows.view(torch.int16).numpy()
    np.testing.assert_array_equal(mine[np.lexsort(mine.T)], whole[np.lexsort(whole.T)])


def _held(reader):
    from pipelines.config.ray_section import RaySection
    from pipelines.data.ingest import load_splits
    from pipelines.execution.embedded import EmbeddedExecutor

    return load_splits(reader, EmbeddedExecutor(RaySection()))


def test_a_killed_computation_continues(planted, monkeypatch):
    config, reader = planted
    written, write = [], stem_outputs._write

    def fails_at_the_third(plan, file):
        if len(written) == 2:
            raise KeyboardInterrupt
        write(plan, file)
        written.append(file)

    monkeypatch.setattr(stem_outputs, "_write", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        with_outputs(config, reader, None)
    again = []
    monkeypatch.setattr(stem_outputs, "_write", lambda plan, file: (again.append(file), write(plan, file)))
    found = with_outputs(config, reader, None)
    assert sorted(written + again) == sorted(reader.manifest.files())
    monkeypatch.setattr(stem_outputs, "_write", None)
    assert with_outputs(config, reader, None).manifest == found.manifest


def test_another_stem_and_other_shards_have_their_own_outputs(planted):
    config, reader = planted
    first = with_outputs(config, reader, None).folder
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 5})})  # of random weights
    assert with_outputs(other, reader, None).folder != first
    rank = config.network.adapter.model_copy(update={"rank": 3})
    adapted = config.model_copy(update={"network": config.network.model_copy(update={"adapter": rank})})
    assert with_outputs(adapted, reader, None).folder == first


def test_damaged_outputs_are_named(planted):
    config, reader = planted
    found = with_outputs(config, reader, None)
    file = found.manifest.files()[0]
    (found.folder.local / file).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=rf"outputs of the frozen stem are damaged: .*{file}"):
        with_outputs(config, reader, None)


def test_they_are_computed_in_each_epoch_where_they_cannot_be_stored(planted, monkeypatch):
    config, reader = planted
    assert with_outputs(changed(config, stem_outputs="off"), reader, None) is reader
    trained = config.model_copy(update={"network": config.network.model_copy(update={"branch": "copy"})})
    assert with_outputs(trained, reader, None) is reader
    with pytest.raises(UserError, match="the stem is trained"):
        with_outputs(changed(trained, stem_outputs="on"), reader, None)
    monkeypatch.setattr(stem_outputs, "SPARE", 0.0)
    lines = []
    assert with_outputs(config, reader, None, lines.append) is reader
    assert "computed in each epoch" in lines[0]
    assert with_outputs(changed(config, stem_outputs="on"), reader, None).outputs


def test_a_run_uses_them_and_its_models_read_inputs(planted):
    config, reader = planted
    lines = []
    done = train(config, lines.append)
    assert any("computing the outputs of the frozen stem once for 600 samples" in line for line in lines)
    assert (reader.folder / FOLDER).folders()
    plain = train(
        changed(config, stem_outputs="off").model_copy(
            update={"run": config.run.model_copy(update={"name": "plain"})}
        )
    )
    assert done.result["grouping"] == plain.result["grouping"]
    for task, metrics in plain.result["metrics"].items():
        assert done.result["metrics"][task]["loss"] == pytest.approx(metrics["loss"], rel=0.05)
    assert (done.run / "report.html").exists()
