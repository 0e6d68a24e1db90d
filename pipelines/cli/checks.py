"""The checks of `dmtg doctor`: each requirement of a run, its state, and a remedy.

A check that can hang (Ray, the GPU driver, MLflow, remote storage) runs in a process of its own, with a timeout.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.machinery import PathFinder
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pipelines.cli.probes import FAIL, WARN, Finding, Probe, run_in_processes, run_probe
from pipelines.config.ray_section import RaySection
from pipelines.config.sections import TrackSection
from pipelines.execution.choice import on_ray
from pipelines.storage import Location, locate

DISTRIBUTION, DRIVER = "dmtg", "nvidia-smi"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the object store of Ray
MIN_DISK_GIB, MIN_SHARED_GIB = 5.0, 1.0  # warnings below these
GIB = 2**30


@dataclass(frozen=True)
class Subject:
    """The subject of all checks.

    Args:
        ray: How Ray runs.
        track: The tracking server.
        places: Name → address of the folders that a run writes to.
        raw: Address of the raw data; empty if there is none.
        extras: Extras of the package that the configuration needs.
    """

    ray: RaySection
    track: TrackSection
    places: Mapping[str, str]
    raw: str = ""
    extras: Sequence[str] = ()


def examine(subject: Subject, *, write: bool, wait_s: float) -> Iterator[Finding]:
    """Run all checks; the findings of local checks come first.

    Args:
        subject: What to check.
        write: Create a run in MLflow and delete it.
        wait_s: Timeout of the checks that can hang, in seconds.
    """
    starts_ray = on_ray(subject.ray)
    probes: list[Probe] = [("MLflow", mlflow_answers, (subject.track, write))]
    if starts_ray:
        probes.insert(0, ("Ray", ray_runs, (subject.ray,)))
    if shutil.which(DRIVER):
        probes.insert(0, ("GPU", gpu, (subject.ray,)))
    places: list[Probe] = [(name, storage_works, (name, place)) for name, place in subject.places.items()]
    if subject.raw:
        places.append(("source.root", raw_data, (subject.raw,)))
    remote = [probe for probe in places if "://" in probe[2][-1]]
    answers = run_in_processes([*probes, *remote], wait_s)
    yield python()
    yield packages(subject.extras)
    yield bytecode()
    yield processors(subject.ray)
    if starts_ray:
        yield shared_memory(subject.ray)
    else:
        yield Finding("Ray", "not used: commands run in their own process (ray.executor)")
    yield disk("temporary files", Path(tempfile.gettempdir()))
    for probe in places:
        if probe not in remote:
            yield from run_probe(probe)
    if not shutil.which(DRIVER):
        yield no_gpu(subject.ray.gpus_per_worker)
    yield from answers


def python() -> Finding:
    """Check the version of Python."""
    found = f"Python {platform.python_version()} at {sys.executable}"
    wanted = _distribution().get("Requires-Python", "")
    if wanted and not Requirement(f"python{wanted}").specifier.contains(platform.python_version()):
        return Finding("Python", found, FAIL, f"install Python {wanted}")
    return Finding("Python", found)


def packages(extras: Sequence[str] = ()) -> Finding:
    """Check the installed versions against the requirements of the package.

    Args:
        extras: Extras that are needed in addition to `pipelines`.
    """
    needed = _requirements(("pipelines", *extras))
    if not needed:
        return Finding(
            "packages", "dmtg is not installed, so its requirements are unknown", WARN,
            "make install, or pip install -e '.[pipelines]'",
        )  # fmt: skip
    wrong = [problem for requirement in needed if (problem := _problem(requirement))]
    if wrong:
        required = ",".join(("pipelines", *extras))
        return Finding("packages", "; ".join(wrong), FAIL, f"make install, or pip install 'dmtg[{required}]'")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "mlflow"))
    return Finding("packages", f"{shown}; all {len(needed)} requirements are met")


def bytecode() -> Finding:
    """Check that Python has compiled torch, or can: every process of Ray imports it."""
    spec = PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("bytecode", "torch cannot be found", WARN, "make install")
    file = Path(cache_from_source(spec.origin))
    if file.exists():
        return Finding("bytecode", "torch is compiled")
    folder = next(parent for parent in file.parents if parent.exists())
    writable = os.access(folder, os.W_OK)
    if writable and not sys.dont_write_bytecode:
        return Finding("bytecode", "torch is compiled at its next import")
    remedy = f"{sys.executable} -m compileall -q {Path(spec.origin).parents[1]}"
    reason = "PYTHONDONTWRITEBYTECODE is set"
    if not writable:
        reason, remedy = f"{folder} is not writable", f"as a user who can write there: {remedy}"
    return Finding(
        "bytecode", f"torch is not compiled, and {reason}: every process of Ray compiles it again", WARN, remedy
    )


def _distribution() -> Any:
    try:
        return metadata.metadata(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return {}


def _requirements(extras: Sequence[str]) -> list[Requirement]:
    try:
        every = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        return []
    environments = [{"extra": extra} for extra in ("", *extras)]
    return [one for one in every if one.marker is None or any(one.marker.evaluate(e) for e in environments)]


def _problem(requirement: Requirement) -> str:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} {version} is not {requirement.specifier}"


def processors(section: RaySection) -> Finding:
    """Check the cores of this machine against the CPUs of all workers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = section.most * section.cpus_per_worker
    found = f"{cores} cores, {section.most} workers with {section.cpus_per_worker:g} CPUs each"
    if section.address or os.environ.get("RAY_ADDRESS"):
        return Finding("CPU", f"{cores} cores here; workers run on the cluster")
    if workers > cores:
        return Finding("CPU", found, WARN, f"workers share cores: set ray.workers={max(cores, 1)} or less")
    return Finding("CPU", found)


def shared_memory(section: RaySection) -> Finding:
    """Check the shared memory, which holds the samples of all workers of a machine."""
    if not SHARED_MEMORY.exists():
        return Finding(
            "shared memory",
            f"no {SHARED_MEMORY}: Ray uses files instead",
            WARN,
            "provide shared memory; files are slow",
        )
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB
    wanted = section.object_store_mib / 1024 if section.object_store_mib else MIN_SHARED_GIB
    found = f"{free:.1f} GiB free in {SHARED_MEMORY}"
    if free < wanted:
        return Finding(
            "shared memory", f"{found}, {wanted:.1f} GiB needed", WARN,
            "give the container more (--shm-size=8g), lower ray.object_store_mib, or set data.cache=stream",
        )  # fmt: skip
    return Finding("shared memory", found)


def disk(what: str, folder: Path) -> Finding:
    """Check the free disk space at a folder, which need not exist."""
    place = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(place).free / GIB
    if free < MIN_DISK_GIB:
        return Finding(what, f"{free:.1f} GiB free at {folder}", WARN, "free disk space, or choose another disk")
    return Finding(what, f"{free:.0f} GiB free at {folder}")


def gpu(section: RaySection) -> list[Finding]:
    """Check the GPUs that the driver and torch find against those of the workers."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}"
        found = f"there is a driver ({shutil.which(DRIVER)}), but torch finds no GPU; {built}"
        remedy = (
            "run nvidia-smi; the driver must support this CUDA, and CUDA_VISIBLE_DEVICES must not hide the GPU"
        )
        return [Finding("GPU", found, FAIL if section.gpus_per_worker else WARN, remedy)]
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(count)))
    found = f"{count} × {names}, CUDA {torch.version.cuda}"
    torch.ones(8, device="cuda").sum().item()  # runs a kernel, or raises
    if not section.gpus_per_worker and section.workers != "auto":
        return [Finding("GPU", found, WARN, "workers do not use the GPU: set ray.gpus_per_worker=1")]
    return [Finding("GPU", found)]


def no_gpu(per_worker: float) -> Finding:
    """The finding for a machine without a GPU driver."""
    if per_worker:
        remedy = "correct if the machines of the cluster have GPUs; otherwise set ray.gpus_per_worker=0"
        return Finding("GPU", f"no driver on this machine, but workers need {per_worker:g} each", WARN, remedy)
    return Finding("GPU", "none: workers train on CPUs")


def ray_runs(section: RaySection) -> list[Finding]:
    """Start Ray or connect to its cluster, and run a task that imports this package."""
    import ray

    from pipelines.execution.session import session

    address = section.address or os.environ.get("RAY_ADDRESS", "")
    started = time.monotonic()
    with session(section):
        remote_python = ray.get(ray.remote(num_cpus=0)(_on_ray).remote())
        resources = ray.cluster_resources()
        seconds = time.monotonic() - started
    where = f"the cluster at {address}" if address else "a local cluster"
    found = f"{where} ran a task after {seconds:.1f} s: {resources.get('CPU', 0):g} CPUs"
    found += f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    if remote_python.rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        return [
            Finding(
                "Ray", f"{found}, Python {remote_python}", FAIL, "use the same version of Python on all machines"
            )
        ]
    return [Finding("Ray", found)]


def _on_ray() -> str:
    import_module("dmtg_core")  # needed on every machine of a cluster
    return platform.python_version()


def mlflow_answers(section: TrackSection, write: bool) -> list[Finding]:
    """Send one request to the tracking server; with `write`, create a run and delete it."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    from pipelines.errors import without_credentials
    from pipelines.registry.errors import reached
    from pipelines.registry.tracking import connect, enabled, tracking_uri

    if not enabled(section):
        return [Finding("MLflow", "tracking is off (track.uri=none)")]
    uri = tracking_uri(section)
    shown = without_credentials(uri)
    file = Path(re.sub("^sqlite:///", "", uri))
    if uri.startswith("sqlite:///") and not file.exists() and not write:
        return [Finding("MLflow", f"no file yet; the first run creates {file}")]
    client = connect(section)
    if not write:
        return [Finding("MLflow", f"{shown} answers; --write checks that it accepts a run")]
    with reached(uri):
        experiment = client.get_experiment_by_name(section.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(section.experiment)
        run = client.create_run(number, run_name="dmtg doctor")
        client.log_metric(run.info.run_id, "doctor", 1.0)
        client.log_text(run.info.run_id, "doctor", "doctor.txt")
        client.delete_run(run.info.run_id)
    return [Finding("MLflow", f"{shown} accepted a run, a metric and an artifact; the run is deleted")]


def storage_works(what: str, address: str) -> list[Finding]:
    """Write, read and delete a small object; check the disk space of a local folder."""
    place = locate(address)
    place.check_bucket()
    there = place if place.local is None else locate(str(_existing(place.local)))
    probe, text = there / f".doctor-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    started = time.monotonic()
    probe.write_text(text)
    try:
        back = probe.read_text()
    finally:
        probe.delete()
    done = f"written, read and deleted in {1000 * (time.monotonic() - started):.0f} ms"
    if back != text:
        return [Finding(what, f"{place} returns other data than was written", FAIL, "check the storage")]
    space = [disk(f"{what}, disk space", place.local)] if place.local is not None else []
    return [Finding(what, f"{place}: {done}"), *space]


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def raw_data(address: str) -> list[Finding]:
    """Check that the raw data exist."""
    place: Location = locate(address)
    if place.exists():
        return [Finding("source.root", f"{place} exists")]
    place.check_bucket()
    return [Finding("source.root", f"{place} does not exist", FAIL, "correct source.root")]
