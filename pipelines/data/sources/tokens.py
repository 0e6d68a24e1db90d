"""Tokenizers of texts: trained on the training split, or read from a file. Id 0 is padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.errors import UserError
from pipelines.storage import Location

_PADDING = "[PAD]"


def train_tokenizer(texts: Sequence[str], vocabulary: int, length: int, *, lowercase: bool) -> Any:
    """A tokenizer of byte pairs, so that no text has an unknown part. The same texts always give the same one.

    (The library's WordPiece trainer gives another tokenizer at every call.)

    Args:
        texts: The training split.
        vocabulary: Most tokens it may have.
        length: Tokens that a text is cut and padded to.
        lowercase: Whether texts are made lower-case first.

    Raises:
        UserError: When the library is not installed, or there is nothing to learn from.
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
    """The tokenizer of a `tokenizer.json`, cutting and padding to `length`.

    Raises:
        UserError: When the library is not installed, the file is missing or no tokenizer, or its token 0 is not
            padding.
    """
    tokenizers = _library()
    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.read_text())
    except FileNotFoundError as error:
        raise UserError(
            "the tokenizer does not exist", where=str(file), remedy="correct source.options.tokenizer"
        ) from error
    except Exception as error:  # the library raises no class of its own
        raise UserError(
            f"not a tokenizer: {error}", where=str(file), remedy="give a tokenizer.json of the tokenizers library"
        ) from error
    padding = tokenizer.id_to_token(0)
    declared = tokenizer.padding
    if not (declared["pad_id"] == 0 if declared else "pad" in str(padding).lower()):
        raise UserError(
            f"its token 0 is {padding!r}, and 0 has to be padding",
            where=str(file),
            remedy="use the tokenizer of an encoder that pads with 0, as BERT does",
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
