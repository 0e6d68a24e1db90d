"""Operations and parameters of inference, against counts by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmtg_core import EncoderSpec, Grouping, GroupingNetwork, InputSpec, NetworkSpec, Task
from dmtg_core.network.cost import (
    Cost,
    grouping_cost,
    history_flops,
    inference_cost,
    naive_flops,
    plain_attention,
    training_flops,
    wide_spec,
)
from tests.dmtg_core.samples import (
    DENSE,
    FEATURES,
    IMAGE,
    ONE_OF_EACH,
    SAMPLEWISE,
    assigned,
    image_spec,
    mlp_spec,
    snapshot,
)

TOKENS = InputSpec("tokens", (12,), "int32", vocabulary=50)
TASKS = (Task("a", "binary"), Task("b", "multiclass", 3), Task("c", "regression"))
MLP = 2 * (6 * 8 + 8 * 4)  # operations of an encoder 6 → 8 → 4


def spec(groups: int = 1, stem: int = 0) -> NetworkSpec:
    return mlp_spec(TASKS, groups, stem=stem)


def test_the_cost_of_an_mlp_is_that_of_its_matrices() -> None:
    heads = 4 * (1 + 3 + 1)
    found = inference_cost(GroupingNetwork(spec()))
    assert found.flops == MLP + 2 * heads
    assert found.parameters == (6 * 8 + 8) + (8 * 4 + 4) + heads + (1 + 3 + 1)


def test_the_cost_of_a_convolution_is_its_kernel_at_each_pixel() -> None:
    image = InputSpec("image", (8, 8, 3), "uint8")
    encoder = EncoderSpec("convnet", options={"widths": [5]})
    found = inference_cost(GroupingNetwork(NetworkSpec(image, (TASKS[0],), encoder, 1)))
    # halved once: 4×4 pixels; two residual blocks of two 3×3 convolutions, one 1×1 if the channels change
    first = 4 * 4 * (9 * 3 * 5 + 9 * 5 * 5 + 3 * 5)
    second = 4 * 4 * 2 * 9 * 5 * 5
    assert found.flops == 2 * (first + second + 5 * 1)


def test_attention_is_counted_in_evaluation_too() -> None:
    image = InputSpec("image", (8, 8, 3), "uint8")
    options = {"patch": 4, "width": 12, "layers": 1, "heads": 2}
    found = inference_cost(GroupingNetwork(NetworkSpec(image, (TASKS[0],), EncoderSpec("vit", 0, options), 1)))
    tokens, width = 5, 12
    block = tokens * (4 * width * width + 2 * 4 * width * width) + 2 * tokens * tokens * width
    assert found.flops == 2 * (4 * (4 * 4 * 3) * width + block + width)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_each_group_adds_the_cost_of_an_encoder(groups: int) -> None:
    naive = inference_cost(GroupingNetwork(spec()))
    network = assigned(GroupingNetwork(spec(groups)), [n % groups for n in range(3)])
    found = inference_cost(network)
    encoder = (6 * 8 + 8) + (8 * 4 + 4)
    assert found == Cost(naive.flops + (groups - 1) * MLP, naive.parameters + (groups - 1) * encoder)


def test_a_stem_is_computed_once_by_a_hard_network_and_by_each_model_of_its_own() -> None:
    network = assigned(GroupingNetwork(spec(2, stem=1)), [0, 1, 1])
    apart, together = inference_cost(network.specialise()), inference_cost(network)
    assert apart.flops - together.flops == 2 * 6 * 8
    assert apart.parameters - together.parameters == 6 * 8 + 8


def test_only_the_likeliest_branches_count_and_the_network_does_not_change() -> None:
    network = assigned(GroupingNetwork(spec(3)), [1, 1, 1]).train()
    before, pairs = snapshot(network), network.pairs
    assert inference_cost(network) == inference_cost(GroupingNetwork(spec()))
    assert network.training
    assert network.pairs == pairs
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(network).items())


@pytest.mark.parametrize("share_stem", [True, False])
def test_a_grouping_has_a_cost_before_it_is_trained(share_stem: bool) -> None:
    described = image_spec((*SAMPLEWISE[:2], DENSE[0]), 4, stem=1)
    network = assigned(GroupingNetwork(described), [2, 0, 2])
    network.keep(network.gate.survivors(2.0))
    grouping = Grouping.of([["smiling", "segments"], ["colour"]], ["smiling", "colour", "segments"])
    assert network.grouping() == grouping
    expected = inference_cost(network if share_stem else network.specialise())
    assert grouping_cost(described, grouping, share_stem=share_stem) == expected


@pytest.mark.parametrize(
    "spec",
    [
        mlp_spec(TASKS, 3),
        mlp_spec(TASKS, 2, stem=1),
        image_spec((*TASKS, DENSE[0]), groups=3),
        NetworkSpec(InputSpec("image", (16, 16, 3), "uint8"), TASKS,
                    EncoderSpec("vit", 0, {"patch": 8, "width": 12, "layers": 1, "heads": 3}), 2),
        NetworkSpec(InputSpec("image", (16, 16, 3), "uint8"), TASKS, EncoderSpec("celeba_resnet", 0), 2),
        NetworkSpec(InputSpec("tokens", (8,), "uint16", vocabulary=50), TASKS,
                    EncoderSpec("embedding_bag", 1, {"embedding": 16, "widths": [12, 8]}), 3),
        NetworkSpec(InputSpec("tokens", (8,), "uint16", vocabulary=50), TASKS,
                    EncoderSpec("text_transformer", 0, {"width": 16, "layers": 2, "heads": 4}), 3),
    ],
    ids=lambda spec: spec.encoder.name,
)  # fmt: skip
def test_the_wide_encoder_has_at_most_the_cost_of_the_groups(spec: NetworkSpec) -> None:
    names = [task.name for task in spec.tasks]
    groups = min(spec.groups, len(names))
    spread = Grouping.from_assignment(names, [n % groups for n in range(len(names))])
    most = grouping_cost(spec, spread).flops
    wide = wide_spec(spec)
    found = grouping_cost(wide, Grouping.of([names])).flops
    assert 0.75 * most < found <= most
    assert wide.groups == 1
    assert wide.encoder.name == spec.encoder.name
    first, second = (GroupingNetwork(s).stem.state_dict() for s in (spec, wide))
    if spec.encoder.stem and spec.encoder.name in ("mlp", "embedding_bag"):
        assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}
    assert grouping_cost(wide_spec(spec, 2.0), Grouping.of([names])).flops > found


def test_an_encoder_of_fixed_widths_cannot_be_widened() -> None:
    with pytest.raises(ValueError, match="resnet18 has fixed widths; those of mlp"):
        EncoderSpec("resnet18").widened(2.0)


def test_a_training_step_counts_every_live_head_three_times() -> None:
    network = GroupingNetwork(spec(3))
    heads = 4 * (1 + 3 + 1)
    assert training_flops(network) == 3 * 3 * (MLP + 2 * heads)
    assert naive_flops(spec(3)) == 3 * (MLP + 2 * heads)
    network.keep_grouping(Grouping.of([["a", "b"], ["c"]]))
    assert training_flops(network) == 3 * (2 * MLP + 2 * heads)
    assert network.training


def test_the_cost_of_an_epoch_is_that_of_its_live_heads() -> None:
    every, pruned = [[0.5, 0.5]] * 3, [[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    heads = (4 * (2 * 1 + 2 * 3 + 2 * 1), 4 * (1 + 2 * 3 + 1))
    history = [{"probabilities": shape} for shape in (every, pruned, every)]
    steps = [3 * (2 * MLP + 2 * live) for live in heads]
    assert history_flops(spec(2), history) == 2 * steps[0] + steps[1]
    assert history_flops(spec(2), []) == 0


@pytest.mark.parametrize(
    ("encoder", "data"),
    [
        (EncoderSpec("mlp", options={"widths": [8, 8]}), FEATURES),
        (EncoderSpec("convnet", 1, {"widths": [8, 16]}), IMAGE),
        (EncoderSpec("vit", options={"patch": 8, "width": 24, "layers": 2, "heads": 2}), IMAGE),
        (EncoderSpec("xception_taskonomy"), InputSpec("image", (64, 64, 3), "uint8")),
        (EncoderSpec("resnet18"), InputSpec("image", (64, 64, 3), "uint8")),
        (EncoderSpec("text_transformer", options={"width": 16, "layers": 2, "heads": 2}), TOKENS),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "kind", "")),
)  # fmt: skip
def test_operations_are_those_that_torch_counts(encoder: EncoderSpec, data: InputSpec) -> None:
    tasks = (
        ONE_OF_EACH
        if data.kind == "image" and encoder.name in ("convnet", "xception_taskonomy")
        else SAMPLEWISE[:3]
    )
    network = GroupingNetwork(NetworkSpec(data, tasks, encoder, groups=3)).eval()
    sample = torch.ones(1, *data.shape, dtype=getattr(torch, data.dtype))
    with plain_attention(), FlopCounterMode(display=False) as counter:
        network.forward_pairs(sample)
    assert training_flops(network) == 3 * counter.get_total_flops() > 0


def test_counting_operations_imports_no_compiler() -> None:
    code = (
        "import sys\n"
        "from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec, Task\n"
        "from dmtg_core.network.cost import inference_cost\n"
        "spec = NetworkSpec(InputSpec('features', (4,)), (Task('a', 'binary'),), EncoderSpec('mlp'), groups=1)\n"
        "print(inference_cost(GroupingNetwork(spec)).flops > 0, 'torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
