"""A small BERT on disk, and networks whose branches have been changed, for tests of frozen encoders."""

from __future__ import annotations

from pathlib import Path

import torch

from dmtg_core import GroupingNetwork


def save_bert(folder: Path) -> Path:
    """Write a BERT with three layers and 40 ids into a folder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def changed(network: GroupingNetwork) -> GroupingNetwork:
    """The network with other branches than at first."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.branches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network
