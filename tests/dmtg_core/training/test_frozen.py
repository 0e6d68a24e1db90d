"""Training with a frozen stem: what changes, what a checkpoint has, and where frozen weights come from."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmtg_core import (
    ArrayData,
    Arrays,
    EncoderSpec,
    GroupingNetwork,
    InputSpec,
    NetworkSpec,
    SearchOptions,
    TrainSettings,
    fit,
    search,
)
from dmtg_core.network.frozen import IN_USE, digest
from dmtg_core.network.grouping_network import clone
from dmtg_core.training import checkpoint
from dmtg_core.training.checkpoint import BASE, load_model, load_network, save_base, save_model, save_network
from dmtg_core.training.data import with_outputs
from dmtg_core.training.warm_start import WarmStart
from tests.dmtg_core import parallel, samples
from tests.dmtg_core.pretrained import save_bert
from tests.dmtg_core.samples import DENSE, FEATURES, SAMPLEWISE
from tests.dmtg_core.training.test_batching import assert_close, local

TASKS = SAMPLEWISE[:4]
WIDTHS = {"widths": [12, 12, 8]}
SPECS = {
    "lora": NetworkSpec(FEATURES, TASKS, EncoderSpec("mlp", 1, WIDTHS, "lora", {"rank": 2}), groups=3),
    "last": NetworkSpec(FEATURES, TASKS, EncoderSpec("mlp", 1, WIDTHS, "last"), groups=3),
}
SETTINGS = TrainSettings(epochs=4, batch_size=16, learning_rate=0.02, search_share=0.5)


@pytest.mark.parametrize("branch", ["lora", "last"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_weights_do_not_change_and_have_no_state(branch, optimizer, tmp_path):
    spec = SPECS[branch]
    network = GroupingNetwork(spec)
    before, updates = digest(network.frozen), samples.snapshot(network.branches)
    settings = replace(SETTINGS, optimizer=optimizer, weight_decay=0.1)
    state = fit(network, samples.data(FEATURES, TASKS, 48), settings, local(tmp_path))
    assert digest(state.network.frozen) == before == state.network.frozen_digest
    after = samples.snapshot(state.network.branches)
    assert any(not torch.equal(after[name], updates[name]) for name in after)
    file, *_ = tmp_path.rglob("optimizer.safetensors")
    names = checkpoint.load_tensors(file)
    assert names
    assert not [name for name in names if name.startswith(checkpoint.FROZEN)]


def test_a_search_resumes_with_adapters(tmp_path):
    spec, data = SPECS["lora"], samples.data(FEATURES, TASKS, 48)
    options = SearchOptions(rung=0.5)
    whole = search(spec, data, SETTINGS, options, context=local())
    assert {one["stage"] for one in whole.candidates} >= {"guided", "start_0", "wide"}

    class StoppedError(Exception):
        pass

    class Interrupted(type(local())):
        reports = 0

        def report(self, record, save):
            super().report(record, save)
            self.reports += 1
            if self.reports == 9:
                raise StoppedError

    with pytest.raises(StoppedError):
        search(spec, data, SETTINGS, options, context=Interrupted(tmp_path, device="cpu"))
    resumed = search(spec, data, SETTINGS, options, context=local(tmp_path))
    assert resumed.metrics == whole.metrics
    assert resumed.grouping == whole.grouping


def train_in_group(rank: int, workers: int, folder) -> None:
    for branch, spec in SPECS.items():
        data = samples.data(FEATURES, TASKS, 48, rank=rank, world_size=workers)
        state = fit(GroupingNetwork(spec), data, SETTINGS, parallel.ProcessContext())
        save_network(folder / f"{branch}_{rank}", state.network)


@pytest.fixture(scope="module")
def folder_with_weights(tmp_path_factory):
    """A small BERT on disk."""
    pytest.importorskip("transformers")
    return save_bert(tmp_path_factory.mktemp("bert"))


def text_spec(folder, branch: str, **options) -> NetworkSpec:
    adapter = {"rank": 2} if branch == "lora" else None
    encoder = EncoderSpec("transformers", 2, {"path": str(folder), **options}, branch, adapter)
    tokens = InputSpec("tokens", (10,), "int32", vocabulary=40)
    return NetworkSpec(tokens, TASKS, encoder, groups=2)


@pytest.mark.parametrize("branch", ["lora", "last"])
def test_weights_from_files_are_in_memory_once_and_not_in_checkpoints(branch, folder_with_weights, tmp_path):
    spec = text_spec(folder_with_weights, branch)
    network, other = GroupingNetwork(spec).eval(), GroupingNetwork(replace(spec, seed=5, groups=3))
    assert other.stem is network.stem
    assert other.shared is network.shared
    save_network(tmp_path / "network", network)
    names = checkpoint.load_tensors(tmp_path / "network" / "network.safetensors")
    assert not [name for name in names if name.startswith(checkpoint.FROZEN)]
    loaded = load_network(tmp_path / "network").eval()
    assert loaded.stem is network.stem
    ids = torch.arange(1, 31).reshape(3, 10).int()
    assert_close(loaded(ids), network(ids), 0)
    del network, other, loaded
    assert not [part for part in IN_USE.values() if part.state_dict()]


@pytest.mark.parametrize("branch", ["lora", "last"])
def test_a_base_beside_the_models_replaces_the_files(branch, folder_with_weights, tmp_path):
    network = GroupingNetwork(text_spec(folder_with_weights, branch)).eval()
    ids = torch.arange(1, 31).reshape(3, 10).int()
    expected = network(ids)
    save_base(tmp_path / "models" / BASE, network)
    for name, model in network.specialise().items():
        save_model(tmp_path / "models" / name, model)
        described = json.loads((tmp_path / "models" / name / "network.json").read_text())
        described["spec"]["encoder"]["options"]["path"] = "/nowhere"
        (tmp_path / "models" / name / "network.json").write_text(json.dumps(described))
        (tmp_path / "models" / name / checkpoint.SEAL).unlink()
    models = [load_model(folder) for folder in sorted((tmp_path / "models").glob("group_*"))]
    assert len({id(model.network.stem) for model in models}) == 1
    found = {name: out for model in models for name, out in model(ids).items()}
    assert_close(found, expected, 1e-5)


def test_changed_and_missing_files_are_named(folder_with_weights, tmp_path):
    save_network(tmp_path / "network", GroupingNetwork(text_spec(folder_with_weights, "lora")))
    file = tmp_path / "network" / "network.json"
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"frozen": "0" * 64}))
    with pytest.raises(ValueError, match=rf"frozen weights in {folder_with_weights} have changed"):
        load_network(tmp_path / "network")
    described["spec"]["encoder"]["options"]["path"] = str(tmp_path / "gone")
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"frozen weights are missing: neither .*base nor .*gone exists"):
        load_network(tmp_path / "network")


def test_adapters_start_from_trained_ones(folder_with_weights):
    spec = text_spec(folder_with_weights, "lora")
    trained = GroupingNetwork(spec)
    with torch.no_grad():
        for parameter in trained.branches.parameters():
            parameter.add_(1.0)
    models = list(trained.specialise().values())
    fresh = GroupingNetwork(replace(spec, seed=9))
    WarmStart(models[:1]).apply(fresh)
    for branch in fresh.branches.values():
        assert_close(dict(branch.state_dict()), dict(models[0].network.branches[0].state_dict()), 0)
    random = replace(spec, encoder=spec.encoder.without_weights())
    with pytest.raises(ValueError, match="trained on other frozen weights"):
        WarmStart(models[:1]).apply(GroupingNetwork(random))


def test_two_workers_equal_one(two_processes, tmp_path):
    two_processes(train_in_group, tmp_path)
    for branch, spec in SPECS.items():
        alone = fit(GroupingNetwork(spec), samples.data(FEATURES, TASKS, 48), SETTINGS, local())
        for rank in (0, 1):
            found = load_network(tmp_path / f"{branch}_{rank}")
            assert_close(samples.snapshot(found), samples.snapshot(alone.network), 1e-4)


def images(branch: str) -> NetworkSpec:
    options = {"widths": [8, 8, 8]}
    adapter = {"rank": 2} if branch == "lora" else None
    return NetworkSpec(
        samples.IMAGE, (*TASKS, DENSE[0]), EncoderSpec("convnet", 1, options, branch, adapter), groups=2
    )


def texts_of_transformer() -> NetworkSpec:
    tokens = replace(
        FEATURES, kind="tokens", shape=(10,), dtype="int32", vocabulary=70_000, mean=(0.0,), std=(1.0,)
    )
    encoder = EncoderSpec("text_transformer", 2, {"width": 16, "heads": 2, "layers": 3}, "lora", {"rank": 2})
    return NetworkSpec(tokens, TASKS, encoder, groups=2)


@pytest.mark.parametrize(
    "spec", [SPECS["lora"], images("last"), texts_of_transformer()], ids=["table", "image", "text"]
)
def test_training_on_stored_outputs_of_the_stem_is_that_on_inputs(spec):
    """Outputs are rounded to bfloat16, here before they are used, so that both trainings have the same values."""
    network = GroupingNetwork(spec)
    if spec.input.kind == "tokens":
        rng = np.random.default_rng(0)
        ids = rng.integers(1, 70_000, (48, 10)).astype(np.int32) * (np.arange(10) < rng.integers(0, 11, (48, 1)))
        raw = samples.arrays(FEATURES, TASKS, 48)
        splits = {name: Arrays(ids.astype(np.int32), raw.labels, raw.present) for name in ("train", "val", "test")}
        data = ArrayData(splits, TASKS)
    else:
        data = samples.data(spec.input, spec.tasks, 48)
    stored = {name: with_outputs(arrays, network.stored_output, 7) for name, arrays in data.splits.items()}

    class Rounded(torch.nn.Module):
        def forward(self, out):
            first, *rest = out if isinstance(out, tuple) else (out,)
            return (first.bfloat16().float(), *rest) if rest else first.bfloat16().float()

    network.stem.append(Rounded())
    # Adam would turn a rounding difference of a gradient near zero into a whole step
    settings = replace(SETTINGS, epochs=2, optimizer="sgd", learning_rate=0.01)
    begun, before = clone(network), samples.snapshot(network)
    alone = fit(network, data, settings, local())
    again = fit(begun, ArrayData(stored, spec.tasks), settings, local())
    found, expected = samples.snapshot(again.network), samples.snapshot(alone.network)
    learned = [name for name, value in expected.items() if value.shape == before[name].shape]
    moved = max(float((expected[name].float() - before[name].float()).abs().max()) for name in learned)
    # a product over another number of samples can be rounded to the next bfloat16
    apart = max(float((found[name].float() - expected[name].float()).abs().max()) for name in learned)
    assert moved > 0.001
    assert apart < 0.05 * moved
    for task, metrics in alone.history[-1]["val"].items():
        assert again.history[-1]["val"][task]["loss"] == pytest.approx(metrics["loss"], rel=0.02)


def test_only_outputs_of_a_frozen_stem_are_stored():
    network = GroupingNetwork(replace(SPECS["lora"], encoder=EncoderSpec("mlp", 1, WIDTHS)))
    with pytest.raises(ValueError, match="only the output of a frozen stem"):
        network.stored_output(torch.zeros(2, 6))
