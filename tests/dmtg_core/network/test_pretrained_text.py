"""Encoders of `transformers`: cut by their structure, equal to the library's own forward, read from a folder."""

import copy
import json
import shutil
import sys

import pytest
import torch
from torch import nn

from dmtg_core import EncoderSpec, GroupingNetwork, InputSpec, NetworkSpec
from dmtg_core.network.batched.branches import BatchedBranches
from dmtg_core.network.batched.choice import features_of_stem
from dmtg_core.network.batched.layers import NotBatchableError
from dmtg_core.network.encoders.masks import EAGER, SDPA
from dmtg_core.network.encoders.pooling import pooling_of
from dmtg_core.training.checkpoint import load_model, load_network, save_model, save_network
from tests.dmtg_core.network.test_encoders import LENGTH, SHAPES, TINY_BERT, VOCABULARY, encoder, inputs_for
from tests.dmtg_core.samples import SAMPLEWISE, assert_same_tensors, assigned
from tests.pretrained import pretrained

library = pytest.importorskip("transformers")

TOKENS = SHAPES["tokens"]
TINY_DISTILBERT = {
    "model_type": "distilbert", "vocab_size": VOCABULARY, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16,
    "max_position_embeddings": LENGTH, "pad_token_id": 0,
}  # fmt: skip
COUNTED = TINY_BERT | {"pad_token_id": 1, "max_position_embeddings": LENGTH + 2}  # positions are counted from 2
RELATIVE = TINY_BERT | {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
    "max_relative_positions": -1,
}  # fmt: skip
ENDS = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "bert": TINY_BERT,
    "distilbert": TINY_DISTILBERT,
    "roberta": COUNTED | {"model_type": "roberta"},
    "xlm-roberta": COUNTED | {"model_type": "xlm-roberta"},
    "mpnet": COUNTED | {"model_type": "mpnet"},
    "electra": TINY_BERT | {"model_type": "electra", "embedding_size": 6},
    "modernbert": TINY_BERT
    | {"model_type": "modernbert", "pad_token_id": 18, "local_attention": 4, "global_attn_every_n_layers": 2}
    | ENDS,
    "deberta": RELATIVE | {"model_type": "deberta"},
    "deberta-v2": RELATIVE
    | {"model_type": "deberta-v2", "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True},
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens_of(family: str) -> InputSpec:
    """The input of a family, with its padding."""
    return InputSpec("tokens", (LENGTH,), "int32", vocabulary=VOCABULARY, padding=FAMILIES[family]["pad_token_id"])


def ids_of(family: str) -> torch.Tensor:
    """Three texts with padding at their ends, one of them whole."""
    ids, padding = inputs_for("transformers"), FAMILIES[family]["pad_token_id"]
    ids = torch.where(ids == 0, padding, torch.where(ids == padding, 3, ids))
    ids[1] = torch.arange(3, 3 + LENGTH)
    return ids


def own_model(config: dict) -> nn.Module:
    """The library's own model, with large weights, so that words differ, and without dropout."""
    torch.manual_seed(5)
    described = library.AutoConfig.for_model(**config)
    for name, value in vars(described).items():
        if "dropout" in name and isinstance(value, float):
            setattr(described, name, 0.0)
    model = library.AutoModel.from_config(described)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


def pooled_by_hand(tokens: torch.Tensor, mask: torch.Tensor, pooling: str = "mean") -> torch.Tensor:
    """The pooling of each text, one at a time."""
    how = {"mean": lambda text: text.mean(0), "max": lambda text: text.amax(0), "cls": lambda text: text[0]}
    return torch.stack([how[pooling](text[seen]) for text, seen in zip(tokens, mask, strict=True)])


@pytest.fixture
def folder(request, tmp_path):
    """A function that saves a tiny model of a family and returns its folder and the model."""

    def saved(family: str, **change):
        model = own_model(FAMILIES[family] | change)
        model.save_pretrained(tmp_path / "pretrained")
        return tmp_path / "pretrained", model

    return saved


# --- equality with the library


@every_family
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_the_stages_of_every_family_equal_the_library(family, training, folder):
    path, model = folder(family)
    spec, ids = tokens_of(family), ids_of(family)
    stages = EncoderSpec("transformers", 0, {"path": str(path)}).stages(spec)
    assert len(stages) == 3
    mask = ids != spec.padding
    tokens = model.train(training)(ids, attention_mask=mask.long()).last_hidden_state
    found = nn.Sequential(*stages).train(training)(ids)
    torch.testing.assert_close(found, pooled_by_hand(tokens, mask), rtol=1e-6, atol=1e-6)
    assert found.std(0).min() > 1e-3


@every_family
def test_every_parameter_is_in_one_stage_and_learns(family):
    stages = EncoderSpec("transformers", 0, {"config": FAMILIES[family]}).stages(tokens_of(family))
    parameters = [p for stage in stages for p in stage.parameters()]
    assert len(set(parameters)) == len(parameters)
    nn.Sequential(*stages)(ids_of(family)).square().sum().backward()
    assert [n for s in stages for n, p in s.named_parameters() if p.grad is None] == []
    own = {n: p.numel() for n, p in own_model(FAMILIES[family]).named_parameters() if not n.startswith("pooler.")}
    assert sum(own.values()) == sum(p.numel() for p in parameters)


@every_family
@torch.no_grad()
def test_adding_padding_changes_nothing_in_any_family(family):
    spec, ids = tokens_of(family), ids_of(family)
    net = nn.Sequential(*EncoderSpec("transformers", 0, {"config": FAMILIES[family]}).stages(spec)).eval()
    for row in ids:
        words = row[row != spec.padding].unsqueeze(0)
        torch.testing.assert_close(net(words), net(row.unsqueeze(0)), rtol=1e-5, atol=1e-6)
    assert net(torch.full((2, LENGTH), spec.padding)).isfinite().all()


@every_family
def test_layers_have_their_names_in_the_library(family, folder):
    path, model = folder(family)
    stages = EncoderSpec("transformers", 0, {"path": str(path)}).stages(tokens_of(family))
    linear = [m for stage in stages for m in stage.modules() if isinstance(m, nn.Linear)]
    names = {m.library_name for m in linear}
    assert len(names) == len(linear)
    assert names == {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.startswith("pooler")
    }
    for layer in linear:
        assert torch.equal(layer.weight, model.get_submodule(layer.library_name).weight)
    assert {m.library_name for m in copy.deepcopy(stages[1]).modules() if isinstance(m, nn.Linear)} <= names


@every_family
def test_branches_of_every_family_equal_the_network_bit_for_bit(family):
    spec = NetworkSpec(
        tokens_of(family), SAMPLEWISE[:4], EncoderSpec("transformers", 2, {"config": FAMILIES[family]}), 3
    )
    network, ids = assigned(GroupingNetwork(spec), [0, 2, 2, 0]).eval(), ids_of(family).int()
    with torch.no_grad():
        hard = network(ids)
        models = network.specialise()
        found = {task: value for model in models.values() for task, value in model(ids).items()}
    assert all(torch.equal(found[task], hard[task]) for task in hard)
    assert NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("family", [name for name in FAMILIES if "deberta" not in name])
@pytest.mark.parametrize("stem", [1, 2])
def test_branches_in_one_pass_equal_branches_one_after_the_other(family, stem):
    spec = EncoderSpec("transformers", stem, {"config": FAMILIES[family]})
    network = GroupingNetwork(NetworkSpec(tokens_of(family), SAMPLEWISE[:4], spec, 3)).train()
    ids = ids_of(family)
    one = network.features(ids)
    network.batched = BatchedBranches(network.branches, features_of_stem(network))
    for k, features in network.features(ids).items():
        torch.testing.assert_close(features, one[k], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["deberta", "deberta-v2"])
def test_branches_that_share_relative_positions_are_not_computed_in_one_pass(family):
    spec = EncoderSpec("transformers", 2, {"config": FAMILIES[family]})
    network = GroupingNetwork(NetworkSpec(tokens_of(family), SAMPLEWISE[:4], spec, 3)).train()
    with pytest.raises(NotBatchableError):
        BatchedBranches(network.branches, features_of_stem(network))


@every_family
@torch.no_grad()
def test_a_copy_is_computed_where_the_attention_is_not_registered(family, monkeypatch):
    spec, ids = tokens_of(family), ids_of(family)
    net = nn.Sequential(*EncoderSpec("transformers", 0, {"config": FAMILIES[family]}).stages(spec)).eval()
    expected = net(ids)
    for interface in (library.AttentionInterface, library.AttentionMaskInterface):  # as in another process
        for name in (SDPA, EAGER):
            monkeypatch.delitem(interface._global_mapping, name)
    assert torch.equal(copy.deepcopy(net)(ids), expected)


def test_gradients_of_positions_are_scaled_like_those_of_tokens():
    gradients = []
    for rescale in ("off", "tasks"):
        spec = NetworkSpec(
            tokens_of("mpnet"), SAMPLEWISE[:4], EncoderSpec("transformers", 1, {"config": FAMILIES["mpnet"]}), 4,
            rescale_gradients=rescale,
        )  # fmt: skip
        network = GroupingNetwork(spec).train()
        network.forward_pairs(ids_of("mpnet")).rows.square().sum().backward()
        gradients.append({name: p.grad for name, p in network.stem.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient / 4, rtol=1e-4, atol=1e-7)


# --- models that are refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY_BERT | {"model_type": "albert", "embedding_size": 6}, "'albert' .* share their weights: encoder.al"),
        (FAMILIES["deberta-v2"] | {"conv_kernel_size": 3}, "encoder.conv runs between its layers"),
        ({"model_type": "t5", "vocab_size": 20, "d_model": 8, "num_layers": 1, "d_kv": 4, "num_heads": 2},
         "'t5' into stages: its forward does not take the input alone"),
        ({"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}, "reads tok"),
        ({"model_type": "t7"}, "no encoder of the model type 't7'"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_cut_is_refused_with_what_was_found(config, message):
    with pytest.raises(ValueError, match=message):
        encoder("transformers", config=config).stages(TOKENS)


def test_positions_that_are_counted_from_the_padding_shorten_the_longest_text():
    encoder("transformers", config=FAMILIES["roberta"]).stages(tokens_of("roberta"))
    config = FAMILIES["roberta"] | {"max_position_embeddings": LENGTH + 1}
    with pytest.raises(ValueError, match="input's length is 7, the model's at most 6"):
        encoder("transformers", config=config).stages(tokens_of("roberta"))


def test_reading_weights_shows_no_progress(folder, capfd):
    path, _ = folder("bert")
    capfd.readouterr()
    EncoderSpec("transformers", 0, {"path": str(path)}).stages(TOKENS)
    assert "Loading" not in capfd.readouterr().err
    assert library.utils.logging.is_progress_bar_enabled()


def test_a_folder_whose_weights_lack_a_layer_is_refused(folder):
    path, _ = folder("bert")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"the weights in .*pretrained' lack encoder.layer.2\."):
        EncoderSpec("transformers", 0, {"path": str(path)}).stages(TOKENS)


# --- pooling


def write_pooling(path, place="1_Pooling", modules=True, **described):
    """Write the files of sentence-transformers."""
    (path / place).mkdir()
    (path / place / "config.json").write_text(json.dumps({"word_embedding_dimension": 8} | described))
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"},
              {"path": place, "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    if modules:
        (path / "modules.json").write_text(json.dumps(listed))


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
@torch.no_grad()
def test_the_pooling_is_that_of_the_files_of_the_model(pooling, folder):
    path, model = folder("bert")
    flag = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}[pooling]
    flags = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens"), False) | {flag: True}
    write_pooling(path, **{f"pooling_mode_{name}": on for name, on in flags.items()})
    spec = EncoderSpec("transformers", 0, {"path": str(path)})
    assert spec.options["pooling"] == pooling
    ids, mask = ids_of("bert"), ids_of("bert") != 0
    expected = pooled_by_hand(model.eval()(ids, attention_mask=mask.long()).last_hidden_state, mask, pooling)
    shutil.copytree(path, path.with_name("copy"))
    torch.testing.assert_close(nn.Sequential(*spec.stages(TOKENS)).eval()(ids), expected, rtol=1e-5, atol=1e-6)
    named = EncoderSpec("transformers", 0, {"path": str(path), "pooling": "max"})
    assert named.options["pooling"] == "max"


def test_the_place_of_the_pooling_is_that_of_the_list_of_modules(tmp_path):
    assert pooling_of(str(tmp_path)) == "mean"
    write_pooling(tmp_path, "9_Other", modules=False, pooling_mode="max")
    assert pooling_of(str(tmp_path)) == "mean"
    shutil.rmtree(tmp_path / "9_Other")
    write_pooling(tmp_path, "9_Other", pooling_mode="max")
    assert pooling_of(str(tmp_path)) == "max"


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True},
            "the pooling cls, max, expected one of",
        ),
        ({"pooling_mode_weightedmean_tokens": True}, "the pooling pooling_mode_weightedmean_tokens"),
        ({}, "the pooling none"),
    ],
)
def test_a_pooling_that_is_not_known_is_refused(tmp_path, described, message):
    write_pooling(tmp_path, **described)
    with pytest.raises(ValueError, match=message):
        pooling_of(str(tmp_path))
    with pytest.raises(ValueError, match="unknown pooling 'last'"):
        encoder("transformers", pooling="last").stages(TOKENS)


# --- the folder


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the library transformers: pip install 'dmtg\[transformers\]'"):
        EncoderSpec("transformers", 0, {"config": TINY_BERT}).stages(TOKENS)


def test_a_folder_without_a_model_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="no model in the folder '.*nowhere'"):
        EncoderSpec("transformers", 0, {"path": str(tmp_path / "nowhere")})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no model in the folder"):
        EncoderSpec("transformers", 0, {"path": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 19}, "input's vocabulary is 20, the model's at most 19"),
        ({"max_position_embeddings": 6}, "input's length is 7, the model's at most 6"),
        ({"pad_token_id": 1}, "pads with id 1, the input with 0"),
    ],
)
def test_a_model_that_does_not_fit_the_input_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        encoder("transformers", config=TINY_BERT | change).stages(TOKENS)


def test_neither_a_folder_nor_a_configuration_is_refused():
    with pytest.raises(ValueError, match="path .a local folder. or config, got neither"):
        EncoderSpec("transformers").stages(TOKENS)


def test_a_saved_network_does_not_need_the_folder_of_its_pretrained_weights(folder, tmp_path):
    folder, _ = folder("bert")
    spec = NetworkSpec(TOKENS, SAMPLEWISE[:4], EncoderSpec("transformers", 1, {"path": str(folder)}), 2)
    network = assigned(GroupingNetwork(spec), [0, 1, 1, 0]).eval()
    stored = spec.encoder.options["config"]
    assert stored == json.loads((folder / "config.json").read_text())
    save_network(tmp_path / "network", network)
    for name, model in network.specialise().items():
        save_model(tmp_path / name, model)
    shutil.rmtree(folder)
    loaded = load_network(tmp_path / "network")
    assert_same_tensors(loaded.state_dict(), network.state_dict())
    assert loaded.spec == spec.without_weights()
    ids = inputs_for("transformers").int()
    with torch.no_grad():
        hard = network(ids)
        assert all(torch.equal(value, hard[task]) for task, value in loaded.eval()(ids).items())
        for name in network.grouping().to_dict():
            assert all(torch.equal(v, hard[t]) for t, v in load_model(tmp_path / name)(ids).items())


def test_a_folder_without_safetensors_is_refused(folder):
    folder, _ = folder("bert")
    spec = EncoderSpec("transformers", 0, {"path": str(folder)})
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match="cannot load the weights in"):
        spec.stages(TOKENS)


# --- real weights


@pytest.mark.soak
@torch.no_grad()
def test_a_published_sentence_encoder_equals_the_library_and_tells_meanings():
    folder = pretrained("minilm")
    tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = ["A man is eating food.", "A man eats something.", "The stock market fell sharply today."]
    given = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    spec = InputSpec("tokens", (16,), "uint16", vocabulary=30522)
    encoder = EncoderSpec("transformers", 5, {"path": str(folder)})
    stages = encoder.stages(spec)
    assert (len(stages), encoder.options["pooling"]) == (7, "mean")
    model = library.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    mask = given["attention_mask"]
    expected = pooled_by_hand(model(given["input_ids"], attention_mask=mask).last_hidden_state, mask.bool())
    found = nn.Sequential(*stages).eval()(given["input_ids"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    a, b, c = nn.functional.normalize(found)
    assert a @ b > 0.7
    assert a @ c < 0.3
