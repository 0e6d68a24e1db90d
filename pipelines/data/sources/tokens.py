"""Tokenizers: trained on the texts of the training split, where id 0 is padding, or read from a file."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import Location

_PADDING = "[PAD]"
_NAMES = ("[pad]", "<pad>", "<|pad|>", "pad")  # of padding in tokenizers of published models, in lower case


def train_tokenizer(texts: Iterable[str], vocabulary: int, length: int, *, lowercase: bool) -> Any:
    """Train a byte-pair tokenizer, which has no unknown tokens. The same texts return the same tokenizer.

    (The WordPiece trainer of the library returns another tokenizer at every call.)

    Args:
        texts: Texts of the training split.
        vocabulary: Largest number of tokens.
        length: Number of tokens to which a text is truncated and padded.
        lowercase: Whether texts are converted to lower case first.

    Raises:
        UserError: When the library is not installed.
    """
    tokenizers = _library()
    pre, normalizers = tokenizers.pre_tokenizers, tokenizers.normalizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC()] + [normalizers.Lowercase()] * lowercase)
    tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[_PADDING],  # the first id, 0
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fixed_length(tokenizer, length, _PADDING)


def load_tokenizer(file: Location, length: int) -> Any:
    """Load a `tokenizer.json`, with truncation and padding to `length`.

    Raises:
        UserError: When the library is not installed, the file is missing or not a tokenizer, or no token of it is
            padding.
    """
    tokenizers = _library()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text())
    except FileNotFoundError as error:
        raise UserError(
            "the tokenizer does not exist", where=str(file), remedy="correct source.options.tokenizer"
        ) from error
    except Exception as error:  # the library has no error class
        raise UserError(
            f"not a tokenizer: {error}", where=str(file), remedy="use a tokenizer.json of the tokenizers library"
        ) from error
    return _fixed_length(tokenizer, length, _padding_of(tokenizer, str(file)))


def _padding_of(tokenizer: Any, where: str) -> str:
    """The token of padding: the one that the file declares, or the one that is named so."""
    if declared := tokenizer.padding:
        return str(tokenizer.id_to_token(declared["pad_id"]))
    named = [token for token in tokenizer.get_vocab(with_added_tokens=True) if token.lower() in _NAMES]
    if len(named) == 1:
        return str(named[0])
    raise UserError(
        f"the tokenizer has {' and '.join(map(repr, sorted(named))) or 'no token'} for padding",
        where=where,
        remedy="use a tokenizer with one padding token, such as [PAD], or with the field padding",
    )


def _fixed_length(tokenizer: Any, length: int, padding: str) -> Any:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(padding), pad_token=padding, length=length)
    return tokenizer


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "texts need the library tokenizers, which is not installed",
            where="source.kind",
            remedy="pip install 'dmtg[text]'",
        ) from error
    return tokenizers
