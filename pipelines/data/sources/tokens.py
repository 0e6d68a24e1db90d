"""Tokenizers: trained on the texts of the training split, or read from a file. Id 0 is padding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import Location

_PADDING = "[PAD]"


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
        UserError: When the library is not installed, the file is missing or not a tokenizer, or its token 0 is
            not padding.
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
    padding = tokenizer.id_to_token(0)
    declared = tokenizer.padding
    if not (declared["pad_id"] == 0 if declared else "pad" in str(padding).lower()):
        raise UserError(
            f"token 0 of the tokenizer is {padding!r}, and must be padding",
            where=str(file),
            remedy="use the tokenizer of an encoder that pads with 0, such as BERT",
        )
    return _fixed_length(tokenizer, length, padding)


def _fixed_length(tokenizer: Any, length: int, padding: str) -> Any:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(pad_id=0, pad_token=padding, length=length)
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
