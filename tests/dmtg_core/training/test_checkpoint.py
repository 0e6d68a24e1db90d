"""Checkpoints: loading restores the saved state, and damaged files are named."""

import io
import json
import pickletools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmtg_core import GroupingNetwork, InputSpec, TrainSettings, TrainState
from dmtg_core.network.grouping_network import clone
from dmtg_core.training import checkpoint as files
from dmtg_core.training.context import LocalContext
from dmtg_core.training.step import WeighedLoss, step_noise, train_step
from tests.dmtg_core import samples
from tests.dmtg_core.samples import assert_same_tensors, assigned, image_spec, mlp_spec

SPECS = {"mlp": mlp_spec(stem=1), "convnet": image_spec()}


def trained(name: str, *, pruned: bool = False, optimizer: str = "adam") -> tuple[TrainState, TrainSettings]:
    """A state after three steps, with moments and running statistics."""
    spec = SPECS[name]
    settings = TrainSettings(learning_rate=1e-2, optimizer=optimizer)
    state = TrainState.fresh(GroupingNetwork(spec), settings)
    if pruned:
        assigned(state.network, [n % 2 for n in range(len(spec.tasks))])
        alive = torch.ones_like(state.network.gate.alive)
        alive[::2, 1:] = False
        state.keep(alive, settings)
    module, context = WeighedLoss(state.network).train(), LocalContext(device="cpu")
    for step in range(3):
        batch = samples.batch(spec.input, spec.tasks, seed=step)
        noise = step_noise(state.network, settings, step, 0, 5)
        train_step(module, state.optimizer, batch, noise, 1.0, settings, context)
    state.epoch, state.step = 2, 3
    state.history = [{"epoch": 1, "val_score": 0.1 + 0.2, "val": {"a": {"auroc": float("nan")}}}]
    state.consider(0.25)
    return state, settings


def moments(state: TrainState) -> dict[str, torch.Tensor]:
    """The optimiser's tensors by name."""
    return {
        f"{name}/{key}": value.clone()
        for name, p in state.network.named_parameters()
        for key, value in state.optimizer.state.get(p, {}).items()
    }


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_a_loaded_network_equals_the_saved_one(tmp_path, name, pruned):
    network = trained(name, pruned=pruned)[0].network.eval()
    files.save_network(tmp_path / "new" / "folder", network)
    loaded = files.load_network(tmp_path / "new" / "folder").eval()
    assert loaded.spec == network.spec
    assert loaded.pairs == network.pairs
    assert_same_tensors(loaded.state_dict(), network.state_dict())
    inputs = samples.batch(network.spec.input, network.tasks).inputs
    expected = network(inputs)
    assert all(torch.equal(value, expected[task]) for task, value in loaded(inputs).items())


@pytest.mark.parametrize("name", SPECS)
def test_a_loaded_group_model_equals_the_saved_one_in_evaluation_mode(tmp_path, name):
    network = trained(name)[0].network
    assigned(network, [n % 2 for n in range(len(network.tasks))]).eval()
    inputs = samples.batch(network.spec.input, network.tasks).inputs
    for group, model in network.specialise().items():
        files.save_model(tmp_path / group, model)
        loaded = files.load_model(tmp_path / group)
        assert not loaded.training
        assert loaded.tasks == model.tasks
        expected = model(inputs)
        assert all(torch.equal(value, expected[task]) for task, value in loaded(inputs).items())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_loaded_training_state_equals_the_saved_one(tmp_path, pruned, optimizer):
    state, settings = trained("convnet", pruned=pruned, optimizer=optimizer)
    state.save(tmp_path)
    loaded = TrainState.load(tmp_path, settings, torch.device("cpu"))
    assert_same_tensors(loaded.network.state_dict(), state.network.state_dict())
    assert_same_tensors(loaded.best.state_dict(), state.best.state_dict())
    assert moments(state)
    assert_same_tensors(moments(loaded), moments(state))
    assert (loaded.epoch, loaded.step, loaded.best_score) == (2, 3, 0.25)
    assert repr(loaded.history) == repr(state.history)


def test_a_state_without_a_best_epoch_can_be_loaded(tmp_path):
    settings = TrainSettings()
    TrainState.fresh(GroupingNetwork(mlp_spec()), settings).save(tmp_path)
    loaded = TrainState.load(tmp_path, settings, torch.device("cpu"))
    assert loaded.best is None
    assert loaded.best_score == float("inf")


def looks_like_a_pickle(content: bytes) -> bool:
    """Whether the bytes are a zip archive (torch.save) or a pickle of protocol 2 or later, or parse as one."""
    if content[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return True
    try:
        pickletools.dis(content, out=io.StringIO())
    except Exception:  # noqa: BLE001 - anything that does not parse is no pickle
        return False
    return True


@pytest.mark.parametrize("name", SPECS)
def test_all_copies_of_a_network_share_its_spec_which_is_encoded_once(tmp_path, monkeypatch, name):
    spec, encode, calls = replace(SPECS[name], seed=7), InputSpec.to_dict, []
    monkeypatch.setattr(InputSpec, "to_dict", lambda spec: calls.append(spec) or encode(spec))
    network = GroupingNetwork(spec)
    copied = clone(network)
    assert copied.spec is network.spec is spec
    assert deepcopy(spec.input) is spec.input
    for place, one in (("first", network), ("second", copied), ("third", network)):
        files.save_network(tmp_path / place, one)
        held = json.loads((tmp_path / place / "network.json").read_text())
        assert held["spec"] == json.loads(json.dumps(spec.to_dict()))
        assert held.keys() >= {"format", "alive"}
    assert len(calls) == 1 + 3  # one of the files, three of this test
    assert replace(spec, seed=8).text != spec.text  # another spec has its own text


def test_a_checkpoint_holds_safetensors_and_json_and_no_pickle(tmp_path):
    state, _ = trained("mlp")
    state.save(tmp_path)
    files_written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(tmp_path)) for path in files_written) == sorted(NAMES)
    for path in files_written:
        assert not looks_like_a_pickle(path.read_bytes()), path.name
        json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)


def test_the_search_for_pickles_finds_one(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip")
    assert looks_like_a_pickle((tmp_path / "zip").read_bytes())
    assert looks_like_a_pickle(b"\x80\x04N.")
    assert looks_like_a_pickle(b"N.")


def test_an_unknown_format_is_refused_with_both_numbers(tmp_path):
    files.save_network(tmp_path, GroupingNetwork(mlp_spec()))
    described = json.loads((tmp_path / "network.json").read_text())
    (tmp_path / "network.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(ValueError, match="network format 99, this version reads 1 and 2"):
        files.load_network(tmp_path)


def written_before(folder) -> None:
    """A saved network in the format of the version before."""
    described = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps(described | {"format": 1}))


@pytest.mark.parametrize("groups", [1, 10, 11, 40])
def test_networks_of_more_than_ten_branches_from_the_version_before_are_refused(tmp_path, groups):
    network = GroupingNetwork(mlp_spec(groups=groups))
    files.save_network(tmp_path, network)
    files.load_network(tmp_path)
    written_before(tmp_path)
    if groups <= 10:
        assert_same_tensors(files.load_network(tmp_path).state_dict(), network.state_dict())
        return
    words = f"trained this on {groups} branches, .* heads \\(smiling, colour, age and 7 more\\) .* train it again"
    with pytest.raises(files.OutdatedNetworkError, match=words):
        files.load_network(tmp_path)


@pytest.mark.parametrize("name", ["network.json", "network.safetensors"])
def test_a_group_model_with_one_changed_bit_is_refused(tmp_path, name):
    files.save_model(tmp_path, GroupingNetwork(mlp_spec(groups=2)).specialise()["group_0"])
    held = bytearray((tmp_path / name).read_bytes())
    held[-1] ^= 1 if name.endswith("safetensors") else ord(" ") ^ ord("\n")  # JSON with another white space
    (tmp_path / name).write_bytes(held)
    files.load_network(tmp_path)
    with pytest.raises(ValueError, match=f"missing or damaged: {name}"):
        files.load_model(tmp_path)


def test_a_group_of_more_than_ten_branches_from_the_version_before_is_refused(tmp_path):
    network = assigned(GroupingNetwork(mlp_spec(groups=12)), list(range(10)))
    files.save_model(tmp_path, network.specialise()["group_0"])
    files.load_model(tmp_path, branches=12)
    written_before(tmp_path)
    (tmp_path / files.SEAL).unlink()  # that version wrote no checksums of a model
    files.load_model(tmp_path, branches=10)
    with pytest.raises(files.OutdatedNetworkError, match="on 12 branches"):
        files.load_model(tmp_path, branches=12)


def test_dense_heads_of_the_version_before_are_correct_with_any_number_of_branches(tmp_path):
    files.save_network(tmp_path, GroupingNetwork(image_spec(samples.DENSE[:2], 11)))
    written_before(tmp_path)
    assert len(files.load_network(tmp_path).branches) == 11


NAMES = (
    "best/network.json", "best/network.safetensors",
    "loop.json", "network.json", "network.safetensors", "optimizer.safetensors",
)  # fmt: skip
DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00 nonsense"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused_by_its_name(tmp_path, name, damage):
    state, settings = trained("mlp")
    state.save(tmp_path)
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(ValueError, match=name):
        TrainState.load(tmp_path, settings, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("network.json", {"format": 1}), ("network.json", []), ("loop.json", {"epoch": 1})],
    ids=str,
)
def test_unexpected_json_is_refused_by_its_name(tmp_path, name, content):
    state, settings = trained("mlp")
    state.save(tmp_path)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name.split(".")[0]):
        TrainState.load(tmp_path, settings, torch.device("cpu"))


def test_weights_that_do_not_fit_their_network_are_refused_by_name(tmp_path):
    state, settings = trained("mlp")
    state.save(tmp_path)
    save_file({"gate.logits": torch.zeros(2, 2)}, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=r"network\.safetensors"):
        TrainState.load(tmp_path, settings, torch.device("cpu"))


def test_moments_of_an_unknown_parameter_are_refused_by_its_name(tmp_path):
    state, settings = trained("mlp")
    state.save(tmp_path)
    save_file({"branches.9.weight/exp_avg": torch.zeros(1)}, tmp_path / "optimizer.safetensors")
    with pytest.raises(ValueError, match=r"'branches\.9\.weight'"):
        TrainState.load(tmp_path, settings, torch.device("cpu"))


def test_a_network_of_several_branches_is_not_a_group_model(tmp_path):
    files.save_network(tmp_path, GroupingNetwork(mlp_spec()))
    with pytest.raises(ValueError, match="3 branches"):
        files.load_model(tmp_path)


def test_slices_and_channels_last_tensors_are_written_whole(tmp_path):
    tensors = {
        "slice": torch.arange(10.0)[2:5],
        "strided": torch.arange(10.0)[::2],
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "shared": torch.arange(10.0)[:4],
        "bfloat16": torch.randn(2, 3, 4, 4).bfloat16().to(memory_format=torch.channels_last),
        "number": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
    }
    files.save_tensors(tmp_path / "t.safetensors", tensors)
    assert_same_tensors(files.load_tensors(tmp_path / "t.safetensors"), tensors)


def test_a_file_that_cannot_be_written_is_an_error_of_the_operating_system(tmp_path):
    with pytest.raises(OSError, match=r"no/weights: .*No such file or directory"):
        files.save_tensors(tmp_path / "no" / "weights", {"weight": torch.zeros(3)})
