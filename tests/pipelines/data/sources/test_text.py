import json
import logging
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dmtg_core import InputSpec
from pipelines.data.preprocessing import load_preparation
from pipelines.data.sources import build_source
from pipelines.data.sources.base import INPUT, BadSampleError
from pipelines.data.sources.text import TextSource
from pipelines.data.sources.tokens import train_tokenizer
from pipelines.errors import UserError
from pipelines.report.contact_sheet import text_of
from pipelines.report.features import text_length
from pipelines.storage import locate
from tests.paths import SHARED
from tests.pipelines.data.memory_plans import plans

EMOTIONS = SHARED / "data" / "goemotions"
FILES = {"train": "train.tsv", "val": "dev.tsv", "test": "test.tsv"}
IDS = {"files": FILES, "columns": ["text", "labels", "id"], "labels_column": "labels", "id_column": "id"}
MOOD = {"column": "mood", "kind": "multiclass"}


@pytest.fixture
def root(tmp_path):
    train = ['I said "no way\t0,2\tt0', "What a lovely day\t1\tt1", "no way back\t\tt2", "a day, a day\t1, 2\tt3"]
    (tmp_path / "train.tsv").write_text("\n".join(train) + "\n")
    (tmp_path / "dev.tsv").write_text("What a lovely day\t0\tv0\nZebra 🦓 crossing\t3\tv1\n")
    (tmp_path / "test.tsv").write_text("\t1\ts0\nway out\t-1\ts1\n")
    (tmp_path / "labels.txt").write_text("anger\njoy of life\nsurprise")
    return tmp_path


def source(root, **options):
    return TextSource(locate(str(root)), {**IDS, "length": 12, **options})


def decode(reader, row):
    tokenizer = Tokenizer.from_str(reader.describe().preparation["tokenizer"])
    return "".join(tokenizer.id_to_token(int(i)) for i in row[INPUT] if i).replace("Ġ", " ").strip()


def test_rows_match_the_description(root):
    reader = source(root, metric="f1")
    description = reader.describe()
    assert [t.name for t in description.tasks] == ["anger", "joy of life", "surprise"]
    assert {(t.kind, t.metric) for t in description.tasks} == {("binary", "f1")}
    assert (description.input.kind, description.input.shape, description.input.dtype) == (
        "tokens",
        (12,),
        "uint16",
    )
    entries = list(reader.entries())
    assert [(e.id, e.split) for e in entries[3:6]] == [("t3", "train"), ("v0", "val"), ("v1", "val")]
    for entry in entries[:4]:
        row = reader.read(entry)
        assert set(row) == set(description.columns)
        for name, value in row.items():
            column = description.columns[name]
            assert value is None or (value.dtype == column.dtype and value.shape == column.shape)


def test_label_ids_become_flags_and_an_empty_cell_is_missing(root):
    reader = source(root)
    found = [reader.read(entry) for entry in list(reader.entries())[:4]]
    names = ("task.anger", "task.joy of life", "task.surprise")
    assert [[row[name] for name in names] for row in found] == [[1, 0, 1], [0, 1, 0], [None] * 3, [0, 1, 1]]


def test_a_quote_is_a_character_of_a_tsv_file(root):
    reader = source(root)
    assert decode(reader, reader.read(next(reader.entries()))) == 'i said "no way'
    upper = source(root, lowercase=False)
    assert decode(upper, upper.read(next(upper.entries()))) == 'I said "no way'


def test_tokens_fit_the_vocabulary_and_padding_is_0_at_the_end(root):
    reader = source(root)
    spec = reader.describe().input
    ids = reader.read(list(reader.entries())[2])[INPUT]
    count = int((ids > 0).sum())
    assert 0 < count < 12
    assert ids[:count].all()
    assert not ids[count:].any()
    assert ids.max() < spec.vocabulary <= 8000


def test_vocabulary_is_from_training_texts_only(root):
    before = source(root).describe()
    (root / "dev.tsv").write_text("completely other words\t0\tv0\n")
    assert source(root).describe() == before
    (root / "train.tsv").write_text("completely other words\t0\tt0\n")
    assert source(root).describe() != before


def test_text_of_unseen_characters_has_no_unknown_byte(root):
    reader = source(root)
    tokenizer = Tokenizer.from_str(reader.describe().preparation["tokenizer"])
    tokenizer.decoder = decoders.ByteLevel()
    assert tokenizer.decode(tokenizer.encode("Ω 🦓").ids) == " ω 🦓"


def test_same_texts_return_the_same_tokenizer():
    # the library hashes with another seed at every call, so that an order which depends on hashes shows here
    texts = [f"{a} {b}{a} {c}" for a in ("low", "mid", "top") for b in ("ing", "ed", "er") for c in range(40)]
    assert len({train_tokenizer(texts, 400, 8, lowercase=True).to_str() for _ in range(5)}) == 1


def test_long_texts_are_truncated_and_counted(root, caplog):
    reader = source(root, length=2)
    with caplog.at_level(logging.INFO):
        assert reader.describe().input.shape == (2,)
    assert "4 of 4 training texts are longer than length=2" in caplog.text
    assert reader.read(next(reader.entries()))[INPUT].shape == (2,)


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (5, r"'3' is not a label id from 0 to 2 in column labels, dev\.tsv, line 2"),
        (6, r"expected a text in column text, got '', test\.tsv, line 1"),
        (7, r"'-1' is not a label id from 0 to 2 in column labels, test\.tsv, line 2"),
    ],
)
def test_rows_that_cannot_be_used_are_bad_samples(root, number, reason):
    reader = source(root)
    with pytest.raises(BadSampleError, match=reason):
        reader.read(list(reader.entries())[number])


def test_id_without_a_column_is_file_and_row(root):
    names = [entry.id for entry in source(root, id_column=None).entries()]
    assert names[:2] == ["train.tsv:1", "train.tsv:2"]
    assert names[-1] == "test.tsv:2"


def test_label_columns_of_one_csv_file(tmp_path):
    (tmp_path / "t.csv").write_text(
        'text,mood,price,split\n"Yes, really",good,1,train\nnever,bad,3,train\nmaybe,,5,val\n'
    )
    price = {"column": "price", "kind": "regression"}
    options = {"file": "t.csv", "tasks": [MOOD, price], "length": 6}
    reader = build_source("text", str(tmp_path), options)
    assert [t.kind for t in reader.describe().tasks] == ["multiclass", "regression"]
    entries = list(reader.entries())
    assert [entry.split for entry in entries] == ["train", "train", "val"]
    found = [reader.read(entry) for entry in entries]
    assert [row["task.mood"] for row in found] == [1, 0, None]
    assert decode(reader, found[0]) == "yes, really"
    pq.write_table(
        pa.table(
            {"text": ["Yes, really", "never"], "mood": ["good", "bad"], "price": [1, 3], "split": ["train"] * 2}
        ),
        tmp_path / "t.parquet",
    )
    parquet = TextSource(locate(str(tmp_path)), {**options, "file": "t.parquet"})
    assert np.array_equal(parquet.read(next(parquet.entries()))[INPUT], found[0][INPUT])


def wordlevel(path, *words, **padding):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if padding:
        tokenizer.enable_padding(**padding)
    tokenizer.save(str(path))


def test_a_tokenizer_from_a_file(root, tmp_path):
    wordlevel(root / "tokenizer.json", "[PAD]", "[UNK]", "no", "way", "back")
    for path in ("tokenizer.json", str(tmp_path / "tokenizer.json")):
        reader = source(root, tokenizer=path, length=4)
        assert reader.describe().input.vocabulary == 5
        assert reader.read(list(reader.entries())[2])[INPUT].tolist() == [2, 3, 4, 0]


def test_a_large_vocabulary_is_stored_in_32_bits(root):
    wordlevel(root / "tokenizer.json", "[PAD]", "[UNK]", *(f"w{i}" for i in range(65535)), "way")
    reader = source(root, tokenizer="tokenizer.json", length=2)
    assert (reader.describe().input.dtype, reader.describe().input.vocabulary) == ("int32", 65538)
    assert reader.read(list(reader.entries())[2])[INPUT].tolist() == [1, 65537]


@pytest.mark.parametrize(
    ("words", "declared", "padding"),
    [
        (("<s>", "<pad>", "[UNK]", "no", "way", "back"), {}, 1),
        (("[PAD]", "[UNK]", "no", "way", "back", "<pad>"), {"pad_id": 5, "pad_token": "<pad>"}, 5),
        (("[UNK]", "no", "way", "back", "[PAD]"), {}, 4),
    ],
)
def test_the_padding_of_a_tokenizer_is_that_of_its_file(root, words, declared, padding):
    wordlevel(root / "tokenizer.json", *words, **declared)
    reader = source(root, tokenizer="tokenizer.json", length=5)
    spec = reader.describe().input
    assert spec.padding == padding
    assert InputSpec(**spec.to_dict()) == spec
    ids = reader.read(list(reader.entries())[2])[INPUT].tolist()
    assert ids == [*map(words.index, ("no", "way", "back")), padding, padding]
    assert text_of(np.array(ids), padding, reader.describe().preparation) == "no way back"
    (length,) = text_length(np.array([ids]), padding)
    assert length.array.tolist() == [3]


def test_a_text_that_is_only_padding_is_refused_for_any_padding(root):
    wordlevel(root / "tokenizer.json", "<s>", "<pad>", "[UNK]", "no")
    preparation = dict(source(root, tokenizer="tokenizer.json").describe().preparation)
    tokenizer = json.loads(preparation["tokenizer"])
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": "x"}, "content": " "}
    with pytest.raises(ValueError, match="no token in the text 'xx'"):
        load_preparation(preparation | {"tokenizer": json.dumps(tokenizer)}).row({"text": "xx"})


def test_tokenizers_that_cannot_be_used(root):
    wordlevel(root / "tokenizer.json", "<s>", "[UNK]")
    with pytest.raises(UserError, match="the tokenizer has no token for padding"):
        source(root, tokenizer="tokenizer.json").describe()
    wordlevel(root / "tokenizer.json", "[PAD]", "<pad>", "[UNK]")
    with pytest.raises(UserError, match="has '<pad>' and '.PAD.' for padding"):
        source(root, tokenizer="tokenizer.json").describe()
    (root / "tokenizer.json").write_text(json.dumps({"model": 1}))
    with pytest.raises(UserError, match="not a tokenizer"):
        source(root, tokenizer="tokenizer.json").describe()
    with pytest.raises(UserError, match="the tokenizer does not exist"):
        source(root, tokenizer="none.json").describe()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"file": "a.csv"}, "give either files"),
        ({"tasks": [MOOD]}, "give either labels_column or tasks"),
        ({"split_column": "fold"}, "split_column has no meaning"),
        ({"tokenizer": "t.json", "vocabulary": 500}, "vocabulary has no meaning"),
        ({"tokenizer": "unigram"}, "source.options.tokenizer"),
        ({"files": {"training": "train.tsv"}}, "source.options.files"),
        ({"text_column": "comment"}, "no column comment"),
        ({"columns": ["text", "labels"], "id_column": None}, "line 1 has 3 cells, expected 2"),
        ({"labels_file": "names.txt"}, "the file of label names does not exist"),
        ({"metric": "rmse"}, "unknown metric"),
        ({"loss_options": {"gamma": 2}}, "loss binary_cross_entropy of a binary task has no option 'gamma'"),
        ({"labels_column": None, "tasks": [MOOD], "loss": "focal"}, "loss has no meaning"),
    ],
)
def test_options_that_cannot_be_used(root, options, message):
    with pytest.raises(UserError, match=message):
        source(root, **options).describe()


def test_all_labels_have_one_loss(root):
    tasks = source(root, loss="focal", loss_options={"gamma": 1}).describe().tasks
    assert {(task.loss, task.loss_options.gamma) for task in tasks} == {("focal", 1)}


def test_a_file_for_two_splits_is_refused(root):
    with pytest.raises(UserError, match="4 ids occur more than once: t0, t1, t2, t3\n"):
        plans(source(root, files={**FILES, "test": "train.tsv"}))


def test_label_names_that_cannot_be_used(root):
    (root / "labels.txt").write_text("anger\n\njoy\n")
    with pytest.raises(UserError, match="no label name in line 2"):
        source(root).describe()
    (root / "labels.txt").write_text("so so\nso-so\nso so\n")
    with pytest.raises(UserError, match="task names must be unique, got so so"):
        source(root).describe()


def test_reader_is_sent_to_a_worker_without_the_texts(root):
    reader = source(root)
    reader.describe()
    entries = list(reader.entries())
    expected = reader.read(entries[0])
    packed = pickle.dumps(reader)
    assert b"Entry" not in packed
    for file in FILES.values():
        (root / file).unlink()
    found = pickle.loads(packed).read(entries[0])  # noqa: S301
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.skipif(not EMOTIONS.is_dir(), reason="the shared GoEmotions data is not beside the checkout")
def test_goemotions():
    reader = source(EMOTIONS)
    entries = list(reader.entries())
    assert [sum(e.split == split for e in entries) for split in FILES] == [43410, 5426, 5427]
    assert len({entry.id for entry in entries}) == 54263
    assert entries[0].fields["row"].cells["labels"] == "27"
