"""Warm start: all weights are copied to their place, and models that do not fit are refused."""

from dataclasses import replace

import pytest
import torch

from dmtg_core import (
    EncoderSpec,
    GroupingNetwork,
    GroupModel,
    NetworkSpec,
    SearchOptions,
    TrainSettings,
    WarmStart,
    evaluate,
    search,
)
from dmtg_core.training import warm_start
from dmtg_core.training.context import LocalContext
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import WeighedLoss, step_noise, train_step
from tests.dmtg_core import samples
from tests.dmtg_core.interrupted import Interrupted
from tests.dmtg_core.samples import (
    MIXED,
    ONE_OF_EACH,
    SAMPLEWISE,
    assert_same_tensors,
    assigned,
    image_spec,
    mlp_spec,
)
from tests.dmtg_core.search.test_search import assert_same_result

SMALL_XCEPTION = {"widths": [4, 6, 8, 10, 10], "features": 5}


def spec_of(name: str, tasks=ONE_OF_EACH, groups: int = 3, *, stem: int = 0, **options) -> NetworkSpec:
    """A small network on an encoder."""
    if name == "mlp":
        return mlp_spec([task for task in tasks if not task.dense], groups, stem=stem, **options)
    spec = image_spec(tasks, groups, encoder=name, stem=stem, **options)
    if name == "xception_taskonomy":
        return replace(spec, encoder=EncoderSpec(name, stem, SMALL_XCEPTION))
    return spec


def model_of(spec: NetworkSpec, *, seed: int = 7, **changes) -> GroupModel:
    """One group's model with changed statistics and biases."""
    model = GroupModel(replace(spec, **{"groups": 1, "seed": seed, **changes}))
    samples.learn_statistics(model.network, samples.batch(spec.input, spec.tasks, 4, seed=seed).inputs)
    return model.eval()


def started(spec: NetworkSpec, *models: GroupModel) -> GroupingNetwork:
    """A network of `spec` that starts from the models, in evaluation mode."""
    network = GroupingNetwork(spec)
    WarmStart(models).apply(network)
    return network.eval()


def stages(network: GroupingNetwork, k: int) -> list[dict[str, torch.Tensor]]:
    """The state of every stage of a branch's encoder."""
    return [stage.state_dict() for stage in [*network.stem, *network.branches[k]]]


def inputs_of(spec: NetworkSpec) -> torch.Tensor:
    return samples.batch(spec.input, spec.tasks, 3, seed=5).inputs


@torch.no_grad()
def through(network: GroupingNetwork, k: int, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every task's output on branch `k`."""
    return assigned(network, [k] * len(network.tasks))(inputs)


CUTS = [("mlp", a, b) for a, b in ((0, 0), (1, 0), (0, 1))]
CUTS += [("convnet", a, b) for a, b in ((0, 0), (2, 2), (0, 2), (2, 1))]
CUTS += [("xception_taskonomy", a, b) for a, b in ((0, 4), (3, 1))]


@pytest.mark.parametrize(("name", "cut", "stem"), CUTS)
def test_one_model_initialises_all_branches_for_any_stem(name, cut, stem):
    spec = spec_of(name, stem=stem)
    model = model_of(spec_of(name, stem=cut))
    network, fresh = started(spec, model), GroupingNetwork(spec)
    inputs = inputs_of(spec)
    with torch.no_grad():
        expected = model(inputs)
    for k in range(spec.groups):
        for mine, trained, drawn in zip(
            stages(network, k), stages(model.network, 0), stages(fresh, k), strict=True
        ):
            assert_same_tensors(mine, trained)
            assert any(not torch.equal(mine[key], drawn[key]) for key in mine)
        for task, value in through(network, k, inputs).items():
            assert torch.equal(value, expected[task])


@pytest.mark.parametrize("initial", ["uniform", "diagonal", "gaussian"])
def test_the_gate_starts_as_it_would_without_models(initial):
    spec = spec_of("mlp", initial=initial, initial_scale=1.0)
    network = started(spec, model_of(spec))
    assert torch.equal(network.gate.logits, GroupingNetwork(spec).gate.logits)
    assert network.gate.alive.all()


@torch.no_grad()
def test_single_task_models_initialise_a_branch_each_and_a_diagonal_gate_assigns_each_task_its_own():
    spec = spec_of("convnet", groups=len(ONE_OF_EACH), initial="diagonal", initial_scale=1.0)
    models = [model_of(spec, seed=30 + i, tasks=(task,)) for i, task in enumerate(spec.tasks)]
    network = started(spec, *models)
    inputs = inputs_of(spec)
    found = network(inputs)
    assert network.grouping().assignment == list(range(spec.groups))
    for model in models:
        for task, value in model(inputs).items():
            assert torch.equal(found[task], value)


@torch.no_grad()
def test_of_several_models_each_initialises_its_branch_and_heads_and_the_rest_is_random():
    spec = spec_of("convnet", MIXED, groups=3)
    models = [model_of(spec, seed=1, tasks=MIXED[:6]), model_of(spec, seed=2, tasks=MIXED[4:])]
    network, fresh = started(spec, *models), GroupingNetwork(spec).eval()
    inputs = inputs_of(spec)
    for k, model in enumerate(models):
        expected, found = model(inputs), through(network, k, inputs)
        assert all(torch.equal(found[task], value) for task, value in expected.items())
        features = network.features(inputs)[k]
        others = [n for n, task in enumerate(spec.tasks) if task.name not in expected]
        assert others
        for n in others:
            drawn = fresh.head(k, n, features, inputs.shape[1:3])
            assert torch.equal(found[spec.tasks[n].name], drawn)
    for task, value in through(fresh, 2, inputs).items():
        assert torch.equal(through(network, 2, inputs)[task], value)


@torch.no_grad()
def test_models_of_one_network_restore_its_shared_stem():
    spec = spec_of("convnet", groups=3, stem=1)
    source = GroupingNetwork(replace(spec, seed=9))
    samples.learn_statistics(source, inputs_of(spec))
    assigned(source, [0, 2, 2, 0, 1])
    network = started(spec, *source.specialise().values())
    expected = source(inputs_of(spec))
    found = assigned(network, source.grouping().assignment)(inputs_of(spec))
    assert all(torch.equal(found[task], value) for task, value in expected.items())


def test_a_head_of_another_task_is_new_and_noted():
    spec = spec_of("mlp")
    own, other, last = spec.tasks
    changed = replace(spec, tasks=(own, replace(other, labels=("a", "b", "c")), replace(last, scale=(1.0, 1.0))))
    model = model_of(changed)
    network, fresh = started(spec, model), GroupingNetwork(spec)
    for k in range(spec.groups):
        bank, drawn = network.bank, fresh.bank
        for task in spec.tasks:
            rows = bank.rows(k, task)
            kept = torch.equal(bank.weights[k][rows], drawn.weights[k][rows])
            assert kept == (task != own)
    (note,) = WarmStart([model], ["m"]).notes(spec)
    assert note == f"every branch starts from m with its heads of smiling; new heads for colour, {last.name}"


def test_other_constants_of_normalisation_are_noted():
    spec = spec_of("convnet")
    moved = replace(spec.input, mean=(0.0,), std=(1.0,))
    first, second = model_of(spec), model_of(replace(spec, input=moved))
    notes = WarmStart([first, second], ["a", "b"]).notes(spec)
    assert len(notes) == 3
    assert notes[0].startswith("branch 0 starts from a with its heads of smiling, ")
    assert notes[2] == (
        "b was trained on input normalised by mean 0 and std 1; here they are 127.5, 120, 130 and 60, 61, 62"
    )


def test_options_that_mean_the_same_are_the_same():
    spec = spec_of("convnet")
    start = WarmStart([model_of(spec)])
    for options in ({"widths": (6, 8, 8)}, {"dense_stride": 0, "widths": [6, 8, 8]}):
        start.check(replace(spec, encoder=EncoderSpec("convnet", 2, options)))
    pretrained = EncoderSpec("resnet18", 1, {"weights": "IMAGENET1K_V1"})
    assert warm_start._described(pretrained) == warm_start._described(EncoderSpec("resnet18"))


SPEC = spec_of("convnet", stem=1)
WRONG = {
    "name": ({"encoder": EncoderSpec("resnet18")}, 'm has the encoder convnet.* the network resnet18'),
    "options": ({"encoder": EncoderSpec("convnet", 0, {"widths": [6]})}, r"widths=\[6, 8, 8\].*widths=\[6\]"),
    "shape": ({"input": replace(SPEC.input, shape=(32, 32, 3))}, r"image of shape \(16, 16, 3\).*\(32, 32, 3\)"),
    "kind": ({"input": samples.FEATURES}, "m reads image .*the network features"),
    "tasks": ({"tasks": (SAMPLEWISE[3],)}, "none of the tasks: it was trained for .*the network is for hat"),
    "decoder": ({"decoder": "xception"}, "'subpixel' of width 8 for segments, normals, .*'xception' of width 8"),
    "width": ({"decoder_width": 16}, "width 8 .*width 16; set network.decoder"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_does_not_fit_is_refused(what):
    changes, message = WRONG[what]
    spec = replace(SPEC, **changes)
    with pytest.raises(ValueError, match=message):
        WarmStart([model_of(SPEC)], ["m"]).check(spec)


def test_a_decoder_does_not_matter_without_a_common_dense_task():
    spec = replace(SPEC, tasks=SAMPLEWISE[:1], decoder_width=16)
    WarmStart([model_of(SPEC)]).check(spec)


def test_models_need_a_branch_each():
    spec = spec_of("mlp", groups=2)
    models = [model_of(spec, seed=i) for i in range(3)]
    with pytest.raises(ValueError, match=r"3 models do not fit 2 branches.*a, b, c; set network.groups=3"):
        WarmStart(models, ["a", "b", "c"]).check_encoder(spec.encoder, spec.groups)
    with pytest.raises(ValueError, match="at least one model"):
        WarmStart([])


def test_a_stem_that_the_models_do_not_share_is_refused():
    spec = spec_of("convnet", stem=2)
    models = [model_of(spec, seed=i) for i in range(2)]
    with pytest.raises(ValueError, match=r"stem of 2 stages, but stage 0 of b .* that of a; set network.stem=0"):
        WarmStart(models, ["a", "b"]).check(spec)
    WarmStart(models).check(replace(spec, encoder=replace(spec.encoder, stem=0)))
    moved = model_of(spec, seed=0)
    moved.network.stem[1][0].body[1].running_mean.add_(1)
    with pytest.raises(ValueError, match="stage 1 of b"):
        WarmStart([models[0], moved], ["a", "b"]).check(spec)


def test_the_digest_changes_with_every_weight():
    spec = spec_of("convnet")
    first, again, other = model_of(spec), model_of(spec), model_of(spec)
    with torch.no_grad():
        other.network.bank.biases[0][-1] += 1e-6
    digests = [
        WarmStart(models).digest() for models in ([first], [again], [other], [first, other], [other, first])
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_copies_of_one_branch_diverge_by_the_noise_of_the_gate():
    """At first all branches have equal losses and θ no gradient. The noise weights their gradients differently."""
    spec = mlp_spec(SAMPLEWISE, groups=3)
    settings = TrainSettings(learning_rate=1e-2)
    state = TrainState.fresh(started(spec, model_of(spec)), settings)
    module, context = WeighedLoss(state.network).train(), LocalContext(device="cpu")
    gradients = []
    for step in range(20):
        batch = samples.batch(spec.input, spec.tasks, 16, seed=step)
        noise = step_noise(state.network, settings, step, 0, 16)
        train_step(module, state.optimizer, batch, noise, 2.5, settings, context)
        gradients.append(float(state.network.gate.logits.grad.abs().max()))
    first, second = (stages(state.network, k)[0]["0.weight"] for k in (0, 1))
    assert gradients[0] < 1e-6
    assert gradients[-1] > 1e-3
    assert float((first - second).norm() / first.norm()) > 0.01


STILL = TrainSettings(epochs=2, batch_size=16, learning_rate=1e-9)  # measures where a stage starts


@pytest.fixture(scope="module")
def data():
    return samples.data(samples.FEATURES, SAMPLEWISE[:3])


def test_every_start_of_a_search_and_naive_mtl_start_from_the_single_model(data):
    spec = mlp_spec(SAMPLEWISE[:3])
    model = model_of(spec)
    losses = {}
    records = []
    context = LocalContext(device="cpu", on_record=records.append)
    search(spec, data, STILL, SearchOptions("dmtg", starts=2), context=context, warm_start=WarmStart([model]))
    expected = evaluate(model, data, "val", context=context)
    for record in records:
        losses[record["stage"]] = {task: found["loss"] for task, found in record["val"].items()}
    assert set(losses) == {"naive_mtl", "start_0", "start_1"}
    for found in losses.values():
        assert found == pytest.approx({task: metrics["loss"] for task, metrics in expected.items()}, rel=1e-4)


def test_with_several_models_naive_mtl_starts_from_scratch(data):
    spec = mlp_spec(SAMPLEWISE[:3], initial="diagonal")
    models = [model_of(spec, seed=i, tasks=(task,)) for i, task in enumerate(spec.tasks)]
    records = []
    context = LocalContext(device="cpu", on_record=records.append)
    search(spec, data, STILL, SearchOptions(budget=20), context=context, warm_start=WarmStart(models))
    first = {record["stage"]: record["val"] for record in reversed(records)}
    naive = evaluate(GroupingNetwork(replace(spec, groups=1)), data, "val", context=context)
    for model in models:
        for task, metrics in evaluate(model, data, "val", context=context).items():
            assert first["start_0"][task]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)
            assert first["naive_mtl"][task]["loss"] == pytest.approx(naive[task]["loss"], rel=1e-4)


def test_the_models_of_a_grouping_are_a_candidate(data):
    spec = mlp_spec(SAMPLEWISE[:3])
    parts = [(spec.tasks[1],), (spec.tasks[0], spec.tasks[2])]
    models = [model_of(spec, seed=i, tasks=tasks) for i, tasks in enumerate(parts)]
    records = []
    context = LocalContext(device="cpu", on_record=records.append)
    found = search(spec, data, STILL, SearchOptions(budget=20), context=context, warm_start=WarmStart(models))
    assert [one["stage"] for one in found.candidates if one["stage"] == "champion"]
    first = next(record for record in records if record["stage"] == "champion")
    assert first["probabilities"] == [[0, 1, 0], [1, 0, 0], [0, 1, 0]]
    for model in models:
        for task, metrics in evaluate(model, data, "val", context=context).items():
            assert first["val"][task]["loss"] == pytest.approx(metrics["loss"], rel=1e-4)


def test_models_without_all_tasks_are_no_candidate(data):
    spec = mlp_spec(SAMPLEWISE[:3])
    models = [model_of(spec, seed=i, tasks=(task,)) for i, task in enumerate(spec.tasks[:2])]
    start = WarmStart(models)
    assert not start.is_grouping(spec.tasks)
    assert start.is_grouping(spec.tasks[:2])
    assert not WarmStart([model_of(spec)]).is_grouping(spec.tasks)  # one model has no groups
    found = search(
        spec, data, STILL, SearchOptions(budget=20), context=LocalContext(device="cpu"), warm_start=start
    )
    assert "champion" not in {one["stage"] for one in found.candidates}


def test_a_search_resumes_with_its_models_and_with_no_others(tmp_path, data):
    spec, settings = mlp_spec(SAMPLEWISE[:3]), TrainSettings(epochs=2, batch_size=16, learning_rate=1e-2)
    start = WarmStart([model_of(spec)])
    expected = search(spec, data, settings, context=LocalContext(device="cpu"), warm_start=start)

    def kill(record):
        if (record["stage"], record["epoch"]) == ("naive_mtl", 2):
            raise Interrupted

    with pytest.raises(Interrupted):
        search(
            spec, data, settings, context=LocalContext(tmp_path, device="cpu", on_record=kill), warm_start=start
        )
    for wrong in (None, WarmStart([model_of(spec, seed=8)])):
        with pytest.raises(ValueError, match="another search, differing in warm_start"):
            search(spec, data, settings, context=LocalContext(tmp_path, device="cpu"), warm_start=wrong)
    found = search(spec, data, settings, context=LocalContext(tmp_path, device="cpu"), warm_start=start)
    assert_same_result(found, expected)
