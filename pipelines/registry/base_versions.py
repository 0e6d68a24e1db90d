"""Registers the frozen weights of group models, once for all versions that have them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dmtg_core.network.grouping_network import GroupingNetwork
from dmtg_core.training.checkpoint import keeps_base, save_base
from pipelines.registry.bases import REFERENCE
from pipelines.registry.logged_models import Origin, described_model, log_files
from pipelines.registry.records import PREFIX, registered, versions
from pipelines.scratch import temporary_folder

DIGEST = f"{PREFIX}base"  # tag of a version: the digest of its weights
logger = logging.getLogger(__name__)


def register_base(origin: Origin, name: str, network: GroupingNetwork, how: str) -> dict[str, Any] | None:
    """Register the frozen weights of a network, unless the registry has them.

    Args:
        origin: The run.
        name: Name of the registered model that has the copies, a version for each digest.
        network: A network of a group.
        how: `COPY`, or `REFERENCE` to register nothing.

    Returns:
        Contents of `base.json`; None if the group models have all of their weights.
    """
    if not keeps_base(network):
        return None
    encoder, digest = network.spec.encoder, network.frozen_digest
    if how == REFERENCE:
        is_path = bool((encoder.options or {}).get("path"))
        source = str(Path(encoder.source).resolve()) if is_path else encoder.source
        return {"digest": digest, "source": source, "is_path": is_path}
    for held in versions(origin.client, name) if registered(origin.client, name) else ():
        if held.tags.get(DIGEST) == digest:
            return {"digest": digest, "name": name, "version": str(held.version)}
    logger.info("registering the frozen weights of the encoder as %s", name)
    with temporary_folder() as folder:

        def save(logged: Any) -> Path:
            save_base(folder, network)
            described_model(origin, logged, {"digest": digest}).save(str(folder / "MLmodel"))
            return folder

        text = f"Frozen weights of the encoder {encoder.name}, SHA-256 {digest}."
        number = log_files(origin, name, save, {DIGEST: digest}, text)
    return {"digest": digest, "name": name, "version": number}
