"""Precision and CUDA graphs: what is chosen for which device, and that a chosen precision changes no result."""

import statistics

import pytest
import torch

from dmtg_core import GroupingNetwork, LocalContext, TrainSettings, fit
from dmtg_core.training import settings as module
from dmtg_core.training.settings import computes_bf16, large, resolve
from tests.dmtg_core import samples
from tests.dmtg_core.samples import SAMPLEWISE, image_spec, mlp_spec

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def with_cpu(monkeypatch: pytest.MonkeyPatch, *capabilities: str) -> None:
    """Let the CPU have exactly these capabilities."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True), raising=False)


def of_size(monkeypatch: pytest.MonkeyPatch, limit: int, **options):
    """What is chosen on the CPU if networks are large from `limit` weights on."""
    monkeypatch.setattr(module, "LARGE", limit)
    return resolve(TrainSettings(**options), GroupingNetwork(mlp_spec()), CPU)


@pytest.mark.parametrize(
    ("capabilities", "limit", "chosen"),
    [
        (["avx512_bf16"], 1, "bf16"),
        (["amx_bf16"], 1, "bf16"),
        (["avx512_bf16"], 10**9, "fp32"),
        (["avx512_f", "avx2", "amx_int8"], 1, "fp32"),
        ([], 1, "fp32"),
    ],
)
def test_bf16_is_chosen_for_large_networks_on_a_cpu_that_has_it(monkeypatch, capabilities, limit, chosen):
    with_cpu(monkeypatch, *capabilities)
    assert of_size(monkeypatch, limit).precision == chosen


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_given_precision_is_used_on_any_device(monkeypatch, precision):
    with_cpu(monkeypatch, *(["avx512_bf16"] if precision == "fp32" else []))
    assert of_size(monkeypatch, 1, precision=precision).precision == precision


def test_a_torch_without_a_list_of_capabilities_means_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not computes_bf16(CPU)


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_is_asked_for_bf16_without_emulation(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(module, "LARGE", 1)
    assert resolve(TrainSettings(), GroupingNetwork(mlp_spec()), GPU).precision == (
        "bf16" if supported else "fp32"
    )


def test_the_size_of_a_network_does_not_change_with_pruning(monkeypatch):
    network = GroupingNetwork(mlp_spec(SAMPLEWISE[:3], groups=3))
    branch = network.branches.values()[0]
    weights = sum(p.numel() for part in (network.stem, branch) for p in part.parameters())
    for limit, expected in ((weights, True), (weights + 1, False)):
        monkeypatch.setattr(module, "LARGE", limit)
        assert large(network) is expected
    alive = torch.zeros(3, 3, dtype=torch.bool)
    alive[:, 2] = True
    network.keep(alive)
    monkeypatch.setattr(module, "LARGE", weights)
    assert large(network)


@pytest.mark.parametrize(
    ("options", "workers", "device", "chosen"),
    [
        ({}, 1, GPU, True),
        ({}, 1, CPU, False),
        ({}, 2, GPU, False),
        ({"accumulate": 2}, 1, GPU, False),
        ({"recompute": True}, 1, GPU, False),
        ({"compile": False}, 1, GPU, False),
        ({"aggregator": "mgda"}, 1, GPU, False),
        ({"cuda_graphs": False}, 1, GPU, False),
        ({"cuda_graphs": True}, 2, GPU, True),
    ],
)
def test_cuda_graphs_are_chosen_where_their_capture_is_safe(monkeypatch, options, workers, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    settings = resolve(TrainSettings(**options), GroupingNetwork(mlp_spec()), device, workers)
    assert settings.cuda_graphs is chosen


def history(spec, seed: int, **options) -> list[dict]:
    """Records of a short training."""
    data = samples.data(spec.input, spec.tasks, 96)
    settings = TrainSettings(epochs=3, batch_size=16, learning_rate=5e-3, seed=seed, **options)
    return fit(GroupingNetwork(spec), data, settings, LocalContext(device="cpu")).history


@pytest.mark.parametrize(("limit", "chosen"), [(1, "bf16"), (10**9, "fp32")])
def test_a_training_uses_and_records_the_choice(monkeypatch, limit, chosen):
    with_cpu(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(module, "LARGE", limit)
    spec = mlp_spec(SAMPLEWISE[:2], groups=2)
    found = history(spec, 1)
    assert [(record["precision"], record["cuda_graphs"]) for record in found] == [(chosen, False)] * 3
    given = history(spec, 1, precision=chosen)
    assert [r["val_score"] for r in found] == [r["val_score"] for r in given]
    other = history(spec, 1, precision="fp32" if chosen == "bf16" else "bf16")
    assert [r["val_score"] for r in found] != [r["val_score"] for r in other]


@pytest.mark.soak
@pytest.mark.skipif(not computes_bf16(CPU), reason="the CPU has no instructions for bfloat16")
@pytest.mark.parametrize(
    "spec", [mlp_spec(), image_spec(encoder="celeba_resnet", stem=0, tasks=SAMPLEWISE)], ids=["table", "images"]
)
def test_bf16_has_the_metrics_of_fp32_within_the_noise_of_seeds(spec):
    scores = {
        precision: [history(spec, seed, precision=precision)[-1]["val_score"] for seed in (1, 2, 3)]
        for precision in ("fp32", "bf16")
    }
    noise = max(statistics.stdev(scores["fp32"]), 0.01)
    assert abs(statistics.mean(scores["bf16"]) - statistics.mean(scores["fp32"])) < 2 * noise
