"""The Ray Serve application of `dmtg serve`. It needs the extra `serve`.

`build` is the `import_path` of a RayService or of `serve deploy`; its arguments are those of `ServeOptions`. A
replica loads the model by its address, so that Ray can replace it on any machine. The address has the number of
the version: all replicas predict with the same model, also while aliases change.

Requests that arrive while a batch is computed become the next batch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from fastapi import FastAPI
from pydantic import Field
from ray import serve

from dmtg_core.network.composite import Composite
from dmtg_core.network.grouping_network import GroupModel
from pipelines.config.loading import load_track
from pipelines.config.sections import TrackSection
from pipelines.config.validation import Section, checked
from pipelines.registry.tracking import tracking_uri
from pipelines.serving.api import Predict, application
from pipelines.serving.fitting import Served, open_model
from pipelines.serving.new_rows import block_rows
from pipelines.serving.records import RowReader, records

BATCHES = 4  # whose requests a replica has at a time
QUEUED = 1000  # requests that wait for a replica; further ones are refused with status 503


class ServeOptions(Section):
    """How a model is served."""

    model: str = Field(description="Registry address, run folder or folder of a saved model.")
    uri: str = Field("", description="Tracking server; empty for that of ray_config.")
    registry_uri: str = Field("", description="Model registry, if it is not the server of uri.")
    ray_config: str = Field("", description="File that names tracking server and registry.")
    trust_code: bool = Field(False, description="Load files that differ from those that were registered.")
    replicas: int = Field(1, ge=1, le=10**4, description="Replicas of the model, or of each group.")
    per_group: bool = Field(False, description="Each group has replicas of its own.")
    cpus: float = Field(1, ge=0, le=10**4, description="CPUs of a replica.")
    gpus: float = Field(0, ge=0, le=10**4, description="GPUs of a replica.")
    max_batch: int = Field(64, ge=1, le=10**6, description="Most requests in a batch.")
    batch_wait_ms: float = Field(0, ge=0, le=10**5, description="How long a batch waits for more requests.")

    def open(self) -> Served:
        """The model.

        Raises:
            UserError: As `pipelines.serving.fitting.open_model`.
        """
        return open_model(self.model, self.track(), trust_code=self.trust_code)

    def track(self) -> TrackSection:
        """The registry."""
        if self.uri:
            return TrackSection(uri=self.uri, registry_uri=self.registry_uri)
        return load_track(ray_config=self.ray_config)

    def pinned(self, served: Served) -> Self:
        """The same options for a process in another folder: the version of a model that was opened, no aliases."""
        track, address = self.track(), served.address
        model = address if ":/" in address else str(Path(address).absolute())
        found = {"model": model, "uri": tracking_uri(track), "registry_uri": track.registry_uri, "ray_config": ""}
        return self.model_copy(update=found)


def build(values: dict[str, Any]) -> serve.Application:
    """The application for the arguments of a configuration of Ray Serve.

    Args:
        values: Values of `ServeOptions`.

    Raises:
        UserError: For a wrong argument, and when the model cannot be loaded.
    """
    options = checked(ServeOptions, values, "args")
    return application_of(options.open(), options)


def application_of(served: Served, options: ServeOptions) -> serve.Application:
    """The application for a model.

    Args:
        served: The model; replicas load it again by its address.
        options: How it is served.
    """
    pinned = options.pinned(served)
    shared: dict[str, Any] = {
        "num_replicas": options.replicas,
        "max_ongoing_requests": options.max_batch * BATCHES,
        "max_queued_requests": QUEUED,
        "ray_actor_options": {"num_cpus": options.cpus, "num_gpus": options.gpus},
    }
    if not options.per_group:
        return serve.deployment(**shared)(serve.ingress()(Whole)).bind(pinned)
    groups = [serve.deployment(**shared, name=name)(Group).bind(pinned, name) for name in served.groups]
    shared["ray_actor_options"] = {"num_cpus": options.cpus}
    return serve.deployment(**shared)(serve.ingress()(Front)).bind(pinned, groups)


def batched(groups: Mapping[str, GroupModel], options: ServeOptions) -> Predict:
    """A function that predicts stored inputs, together with those of requests that arrive at the same time."""
    device = torch.device("cuda" if options.gpus and torch.cuda.is_available() else "cpu")
    composite = Composite(groups.values()).to(device).eval()
    most = block_rows(next(iter(groups.values())).spec.input)

    def block(stored: np.ndarray) -> list[dict[str, Any]]:
        decoded = composite.predict(torch.from_numpy(stored).to(device))
        return records(composite.tasks, {name: values.cpu().numpy() for name, values in decoded.items()})

    def predict(inputs: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        stored = np.concatenate(inputs)
        found = [one for start in range(0, len(stored), most) for one in block(stored[start : start + most])]
        ends = np.cumsum([len(one) for one in inputs])
        return [found[end - len(one) : end] for one, end in zip(inputs, ends, strict=True)]

    @serve.batch(max_batch_size=options.max_batch, batch_wait_timeout_s=options.batch_wait_ms / 1000)
    async def together(inputs: list[np.ndarray]) -> list[list[dict[str, Any]]]:
        return await asyncio.to_thread(predict, inputs)

    return together


class Whole:
    """A replica that predicts all tasks.

    Args:
        options: The model, and how it is served.
    """

    def __init__(self, options: ServeOptions) -> None:
        served = options.open()
        self.reader, self.predict = RowReader(served), batched(served.groups, options)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve calls it."""
        return application(self.reader, self.predict)


class Group:
    """A replica that predicts the tasks of a group.

    Args:
        options: The model, and how it is served.
        name: The group.
    """

    def __init__(self, options: ServeOptions, name: str) -> None:
        self.predict = batched({name: options.open().groups[name]}, options)

    async def __call__(self, stored: np.ndarray) -> list[dict[str, Any]]:
        """Predict stored inputs."""
        return await self.predict(stored)


class Front:
    """A replica that reads requests, and asks the replicas of all groups.

    Args:
        options: The model, and how it is served.
        groups: Handles of the groups.
    """

    def __init__(self, options: ServeOptions, groups: Sequence[Any]) -> None:
        self.reader, self.groups = RowReader(options.open()), groups

    async def predict(self, stored: np.ndarray) -> list[dict[str, Any]]:
        """The records of all groups, joined."""
        found = await asyncio.gather(*(group.remote(stored) for group in self.groups))
        return [dict(pair for part in parts for pair in part.items()) for parts in zip(*found, strict=True)]

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application; Ray Serve calls it."""
        return application(self.reader, self.predict)
