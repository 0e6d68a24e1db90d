"""Every recipe that ships trains: on generated files in the exact form of its data set, read by its reader."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch

from dmtg_core import ArrayData, GroupingNetwork, LocalContext
from dmtg_core.training.state import TrainState
from dmtg_core.training.step import WeighedLoss, step_noise, train_step
from pipelines.config.loading import Config, load_config
from pipelines.data.manifest import Manifest
from pipelines.data.reader import Reader
from pipelines.data.shards import table_of
from pipelines.data.sources import build_source
from pipelines.data.sources.base import Description, Source
from pipelines.recipes import recipes
from pipelines.scaffold.example import write_hall
from pipelines.storage import locate
from tests.pipelines import raw_data
from tests.pipelines.data.sources.array_files import write_nyuv2


def hall(root: Path) -> Path:
    write_hall(locate(str(root)))
    return root


# reader or recipe → what writes its files; words that change what would be slow, or mean nothing, with two samples
WRITERS: Mapping[str, Callable[[Path], Path]] = {
    "celeba": raw_data.write_celeba,
    "cifar100": raw_data.write_cifar100,
    "cifar100_webdataset": raw_data.write_cifar100_webdataset,
    "clothing": raw_data.write_clothing,
    "clothing_efficientnet": raw_data.write_clothing,
    "goemotions": raw_data.write_goemotions,
    "goemotions_minilm": raw_data.write_goemotions_minilm,
    "hall": hall,
    "nuclei": raw_data.write_nuclei,
    "nyuv2": write_nyuv2,
    "planted": lambda root: root,  # made from its options
    "qm9": raw_data.write_qm9,
    "rooms": lambda root: root,  # its reader draws its files
    "taskonomy": raw_data.write_taskonomy,
    "three_cameras": raw_data.write_three_cameras,
    "tox21": raw_data.write_tox21,
}
SMALLER: Mapping[str, Sequence[str]] = {
    "goemotions_minilm": [  # six layers, as the published model has
        "network.options.config={model_type: bert, vocab_size: 64, hidden_size: 8, num_hidden_layers: 6}",
        "network.options.config.num_attention_heads=2",
        "network.options.config.intermediate_size=16",
    ],
    "nyuv2": [
        "network.encoder=convnet",
        "network.options={widths: [8, 8, 8, 8, 8]}",
        "network.decoder_width=16",
    ],
    "planted": ["network.options={widths: [32, 16]}"],  # two rows can leave all of four features dark
    "rooms": ["source.options.buildings=3", "source.options.points=1"],
    "taskonomy": ["source.options.size=32"],
}
ROWS = 2
# recipes that differ from another one by a number only
VARIANT = re.compile(r"k3_shared|k4_shared|stem\d|_k[45]$|celeba9_k3|vit_k3|_single$")
PAPER = [name for name in recipes() if name.startswith("paper/")]


@pytest.fixture(scope="session")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The root of the generated files of a data set, written when it is first asked for."""
    written: dict[str, Path] = {}

    def root_of(kind: str) -> Path:
        if kind not in written:
            written[kind] = WRITERS[kind](tmp_path_factory.mktemp("raw") / kind)
        return written[kind]

    return root_of


def data_set(name: str) -> str:
    """The key of a recipe in `WRITERS`."""
    source = load_config(name).source
    assert source is not None
    return source.kind if source.kind in WRITERS else name


def source_of(config: Config) -> Source:
    assert config.source is not None
    return build_source(config.source.kind, config.source.root, config.source.options)


def samples(config: Config) -> tuple[Description, ArrayData]:
    """The first samples of the recipe's source, as they would come back from a shard."""
    source = source_of(config)
    entries, description = list(source.entries())[:ROWS], source.describe()
    manifest = Manifest(description, {}, {})
    tasks = manifest.tasks(config.data.tasks, "")
    table = table_of(description, [(entry.id, source.read(entry)) for entry in entries])
    return description, ArrayData({"train": Reader(locate(""), manifest, tasks).arrays(table)}, tasks)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.soak) if VARIANT.search(name) else name for name in recipes()]
)
def test_two_steps_of_a_recipe(name: str, raw: Callable[[str], Path]) -> None:
    kind = data_set(name)
    config = load_config(name, [f"source.root={raw(kind)}", *SMALLER.get(kind, [])])
    description, data = samples(config)
    settings = config.settings()
    state = TrainState.fresh(GroupingNetwork(config.network_spec(description.input, data.tasks)), settings)
    assert len(state.network.pairs) == config.network.groups * len(data.tasks)
    module = WeighedLoss(state.network, settings.entropy_weight, settings.precision).train()
    before = [parameter.detach().clone() for parameter in state.network.parameters()]
    for step in range(2):
        (batch,) = data.train(step, ROWS)
        noise = step_noise(state.network, settings, step, 0, ROWS)
        figures = train_step(
            module, state.optimizer, batch, noise, settings.temperature(0), settings, LocalContext(device="cpu")
        )
        assert torch.isfinite(figures.by_task).all()
        assert not figures.refused
    named = state.network.named_parameters()
    still = [name for old, (name, new) in zip(before, named, strict=True) if torch.equal(old, new)]
    frozen = [name for name, parameter in state.network.named_parameters() if not parameter.requires_grad]
    assert bool(frozen) == (config.network.branch != "copy")  # adapters of a frozen stem, which stays as it is
    fixed = ["gate.logits"] if config.network.groups == 1 else []  # one group leaves nothing to choose
    assert sorted(still) == sorted({*frozen, *fixed})


@pytest.mark.parametrize("name", [name for name in PAPER if "taskonomy" in name])
def test_network_of_the_published_size(name: str, tmp_path: Path) -> None:
    config = load_config(name, [f"source.root={tmp_path}"])
    description = source_of(config).describe()
    assert description.input.shape == (256, 256, 3)
    tasks = Manifest(description, {}, {}).tasks(config.data.tasks, "")
    with torch.device("meta"):  # shapes alone: nothing is drawn or computed
        network = GroupingNetwork(config.network_spec(description.input, tasks))
    assert len(network.stem) == config.network.stem
    assert len(network.branches) == config.network.groups
    assert len(network.pairs) == config.network.groups * len(network.tasks)


@pytest.mark.parametrize("name", PAPER)
def test_names_of_the_papers_recipes_say_what_they_are(name: str) -> None:
    config = load_config(name)
    assert config.name == name.removeprefix("paper/")
    groups, stem = re.search(r"_k(\d)", name), re.search(r"_stem(\d)", name)
    assert config.network.groups == (int(groups[1]) if groups else 1)
    assert config.search.baseline == (groups is not None)
    if stem or "celeba" in name:
        assert config.network.stem == (int(stem[1]) if stem else int("shared" in name))
    assert len(config.data.tasks or []) == (1 if "single" in name else 9 if "celeba9" in name else 0)
    assert config.search.method == "dmtg"
    assert (config.train.seed, config.search.share, config.train.epochs) == (22, 1, 100)


@pytest.mark.parametrize("kind", ["celeba", "taskonomy"])
def test_recipes_of_a_data_set_read_the_same_shards(kind: str) -> None:
    configs = [load_config(name) for name in PAPER if kind in name]
    assert len(configs) > 5
    assert all((c.source, c.data.shards) == (configs[0].source, configs[0].data.shards) for c in configs)
    assert len({c.run_name() for c in configs}) == len(configs)
