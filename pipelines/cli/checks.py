"""`dmtg doctor`: is everything here that a run needs, does it answer, and what is to be done where it does not.

What can hang (Ray, a GPU's driver, MLflow, storage that is not local) is asked in processes of their own, all at
once, and each has the same number of seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import cache_from_source, find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from pipelines.config.ray_section import RaySection
from pipelines.config.sections import TrackSection
from pipelines.errors import UserError
from pipelines.storage import Location, locate

OK, WARN, FAIL = "ok", "warn", "fail"
DISTRIBUTION, DRIVER = "dmtg", "nvidia-smi"
SHARED = Path("/dev/shm")  # noqa: S108 - where Ray puts its objects
ROOM_GIB, SHARED_GIB = 5.0, 1.0  # less than that is soon full
GIB = 2**30
PARTING_S = 5.0  # for a process that has answered to end by itself


@dataclass(frozen=True)
class Finding:
    """One line of the table: what was looked at, what was found, a verdict, and what to do about it."""

    what: str
    found: str
    verdict: str = OK
    remedy: str = ""


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        places: Name → address of folders that a run writes to.
        raw: Address of the raw data; empty where there is none.
        extras: Extras of the package that the configuration needs.
    """

    ray: RaySection
    track: TrackSection
    places: Mapping[str, str]
    raw: str = ""
    extras: Sequence[str] = ()


Probe = tuple[str, Callable[..., list[Finding]], tuple[Any, ...]]


def examine(subject: Subject, *, write: bool, wait_s: float) -> Iterator[Finding]:
    """All findings, those first that need nobody's answer.

    Args:
        write: Also make a run in MLflow, and delete it again.
        wait_s: How long each of those that can hang is waited for.
    """
    probes: list[Probe] = [("Ray", ray_runs, (subject.ray,)), ("MLflow", mlflow_answers, (subject.track, write))]
    if shutil.which(DRIVER):
        probes.insert(0, ("GPU", gpu, (subject.ray.gpus_per_worker,)))
    places: list[Probe] = [(name, storage_works, (name, place)) for name, place in subject.places.items()]
    if subject.raw:
        places.append(("source.root", raw_data, (subject.raw,)))
    remote = [probe for probe in places if "://" in probe[2][-1]]
    answers = _asked([*probes, *remote], wait_s)
    yield python()
    yield packages(subject.extras)
    yield bytecode()
    yield processors(subject.ray)
    yield shared_memory(subject.ray)
    yield disk("temporary files", Path(tempfile.gettempdir()))
    for probe in places:
        if probe not in remote:
            yield from _tried(probe)
    if not shutil.which(DRIVER):
        yield no_gpu(subject.ray.gpus_per_worker)
    yield from answers


def python() -> Finding:
    """The interpreter."""
    found = f"Python {platform.python_version()} at {sys.executable}"
    wanted = _distribution().get("Requires-Python", "")
    if wanted and not Requirement(f"python{wanted}").specifier.contains(platform.python_version()):
        return Finding("Python", found, FAIL, f"install Python {wanted}")
    return Finding("Python", found)


def packages(extras: Sequence[str] = ()) -> Finding:
    """Installed versions against those that the package asks for.

    Args:
        extras: What is needed beside the base install and the drivers.
    """
    needed = _requirements(("pipelines", *extras))
    if not needed:
        return Finding(
            "packages", "dmtg itself is not installed: its versions cannot be compared", WARN,
            "make install, or pip install -e '.[pipelines]'",
        )  # fmt: skip
    wrong = [problem for requirement in needed if (problem := _problem(requirement))]
    if wrong:
        asked = ",".join(("pipelines", *extras))
        return Finding("packages", "; ".join(wrong), FAIL, f"make install, or pip install 'dmtg[{asked}]'")
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "mlflow"))
    return Finding("packages", f"{shown}; all {len(needed)} are of versions that are asked for")


def bytecode() -> Finding:
    """Whether Python has compiled torch, or will: every process of Ray imports it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return Finding("bytecode", "torch cannot be found", WARN, "make install")
    file = Path(cache_from_source(spec.origin))
    if file.exists():
        return Finding("bytecode", "torch is compiled")
    folder = next(parent for parent in file.parents if parent.exists())
    writable = os.access(folder, os.W_OK)
    if writable and not sys.dont_write_bytecode:
        return Finding("bytecode", "torch is compiled when it is next imported")
    remedy = f"{sys.executable} -m compileall -q {Path(spec.origin).parents[1]}"
    why = "PYTHONDONTWRITEBYTECODE is set"
    if not writable:
        why, remedy = f"{folder} cannot be written", f"as a user who may write there: {remedy}"
    return Finding(
        "bytecode", f"torch is not compiled, and {why}: every process of Ray compiles it again", WARN, remedy
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
    """Cores of this machine against what Ray is told to use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = section.most * section.cpus_per_worker
    found = f"{cores} cores, {section.most} workers with {section.cpus_per_worker:g} CPUs each"
    if section.address or os.environ.get("RAY_ADDRESS"):
        return Finding("CPU", f"{cores} cores here; workers run on the cluster")
    if workers > cores:
        return Finding("CPU", found, WARN, f"they take turns: set ray.workers={max(cores, 1)} or less")
    return Finding("CPU", found)


def shared_memory(section: RaySection) -> Finding:
    """Where Ray keeps samples for all workers of a machine."""
    if not SHARED.exists():
        return Finding(
            "shared memory", f"no {SHARED}: Ray uses files instead", WARN, "fine for a trial, slow else"
        )
    free = shutil.disk_usage(SHARED).free / GIB
    wanted = section.object_store_mib / 1024 if section.object_store_mib else SHARED_GIB
    found = f"{free:.1f} GiB free in {SHARED}"
    if free < wanted:
        return Finding(
            "shared memory", f"{found}, {wanted:.1f} GiB wanted", WARN,
            "give the container more (--shm-size=8g), lower ray.object_store_mib, or set data.cache=stream",
        )  # fmt: skip
    return Finding("shared memory", found)


def disk(what: str, folder: Path) -> Finding:
    """Room where a folder is, or will be."""
    place = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(place).free / GIB
    if free < ROOM_GIB:
        return Finding(what, f"{free:.1f} GiB free at {folder}", WARN, "make room, or choose another disk")
    return Finding(what, f"{free:.0f} GiB free at {folder}")


def gpu(per_worker: float) -> list[Finding]:
    """GPUs as the driver and as torch see them, against what workers are given."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}"
        found = f"there is a driver ({shutil.which(DRIVER)}), but torch sees no GPU; {built}"
        remedy = "run nvidia-smi; the driver has to be as new as that CUDA, CUDA_VISIBLE_DEVICES must not hide it"
        return [Finding("GPU", found, FAIL if per_worker else WARN, remedy)]
    names = ", ".join(dict.fromkeys(torch.cuda.get_device_name(i) for i in range(count)))
    found = f"{count} × {names}, CUDA {torch.version.cuda}"
    torch.ones(8, device="cuda").sum().item()  # a kernel runs, or says why not
    if not per_worker:
        return [Finding("GPU", found, WARN, "workers do not use it: set ray.gpus_per_worker=1")]
    return [Finding("GPU", found)]


def no_gpu(per_worker: float) -> Finding:
    """What it means that this machine has no driver."""
    if per_worker:
        remedy = "right where the machines of a cluster have some; else set ray.gpus_per_worker=0"
        return Finding("GPU", f"no driver here, and workers want {per_worker:g} each", WARN, remedy)
    return Finding("GPU", "none: workers train on CPUs")


def ray_runs(section: RaySection) -> list[Finding]:
    """Ray started, or its cluster joined, and one task run there that imports this package."""
    import ray

    from pipelines.cluster import session

    address = section.address or os.environ.get("RAY_ADDRESS", "")
    started = time.monotonic()
    with session(section):
        python_there = ray.get(ray.remote(num_cpus=0)(_on_ray).remote())
        resources = ray.cluster_resources()
        took = time.monotonic() - started
    where = f"the cluster at {address}" if address else "a local one"
    found = f"{where} ran a task after {took:.1f} s: {resources.get('CPU', 0):g} CPUs"
    found += f", {resources['GPU']:g} GPUs" if resources.get("GPU") else ""
    if python_there.rpartition(".")[0] != platform.python_version().rpartition(".")[0]:
        return [Finding("Ray", f"{found}, Python {python_there}", FAIL, "give both sides the same Python")]
    return [Finding("Ray", found)]


def _on_ray() -> str:
    import_module("dmtg_core")  # the machines of a cluster need it
    return platform.python_version()


def mlflow_answers(section: TrackSection, write: bool) -> list[Finding]:
    """The tracking server, asked once; a run made and deleted where that is wanted."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    from pipelines.registry.errors import reached, without_credentials
    from pipelines.registry.tracking import connect, enabled, tracking_uri

    if not enabled(section):
        return [Finding("MLflow", "tracking is off (track.uri=none)")]
    uri = tracking_uri(section)
    shown = without_credentials(uri)
    file = Path(re.sub("^sqlite:///", "", uri))
    if uri.startswith("sqlite:///") and not file.exists() and not write:
        return [Finding("MLflow", f"no file yet, the first run makes {file}")]
    client = connect(section)
    if not write:
        return [Finding("MLflow", f"{shown} answers; --write tries whether it takes a run")]
    with reached(uri):
        experiment = client.get_experiment_by_name(section.experiment)
        number = experiment.experiment_id if experiment else client.create_experiment(section.experiment)
        run = client.create_run(number, run_name="dmtg doctor")
        client.log_metric(run.info.run_id, "doctor", 1.0)
        client.log_text(run.info.run_id, "doctor", "doctor.txt")
        client.delete_run(run.info.run_id)
    return [Finding("MLflow", f"{shown} took a run, a figure and an artifact; the run is deleted")]


def storage_works(what: str, address: str) -> list[Finding]:
    """A small object written, read and deleted; room on the disk where it is a local one."""
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
    took = f"written, read and deleted in {1000 * (time.monotonic() - started):.0f} ms"
    if back != text:
        return [Finding(what, f"{place} gives back something else than was written", FAIL, "check the storage")]
    room = [disk(f"{what}, room", place.local)] if place.local is not None else []
    return [Finding(what, f"{place}: {took}"), *room]


def _existing(folder: Path) -> Path:
    return next(one for one in (folder, *folder.parents) if one.is_dir())


def raw_data(address: str) -> list[Finding]:
    """Whether the raw data are there."""
    place: Location = locate(address)
    if place.exists():
        return [Finding("source.root", f"{place} is there")]
    place.check_bucket()
    return [Finding("source.root", f"nothing at {place}", FAIL, "correct source.root")]


def _asked(probes: Sequence[Probe], wait_s: float) -> Iterator[Finding]:
    """What each probe finds, started together; one that does not answer in time is ended and fails."""
    context = multiprocessing.get_context("spawn")
    until = time.monotonic() + wait_s
    running = []
    for what, function, arguments in probes:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, what, function, arguments))
        process.start()
        theirs.close()
        running.append((what, process, ours))
    return _collected(running, until, wait_s)


def _collected(running: Sequence[tuple[str, Any, Connection]], until: float, wait_s: float) -> Iterator[Finding]:
    for what, process, ours in running:
        silent = not ours.poll(max(until - time.monotonic(), 0))
        try:
            yield from [_silence(what, wait_s)] if silent else ours.recv()
        except EOFError:
            process.join(PARTING_S)
            yield Finding(what, f"its process ended with exit code {process.exitcode}", FAIL, "run it again")
        finally:
            process.join(0 if silent else PARTING_S)
            if process.is_alive():
                process.terminate()
                process.join(PARTING_S)
            if process.is_alive():
                process.kill()


def _silence(what: str, wait_s: float) -> Finding:
    return Finding(
        what, f"no answer in {wait_s:g} s", FAIL,
        "is the address right, is it running, does a firewall swallow it? --timeout waits longer",
    )  # fmt: skip


def _tried(probe: Probe) -> list[Finding]:
    """What a probe finds, or how it failed."""
    what, function, arguments = probe
    try:
        return function(*arguments)
    except UserError as error:
        return [Finding(what, f"{error.what} ({error.where})" if error.where else error.what, FAIL, error.remedy)]
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was asked for
        first = str(error).strip().partition("\n")[0]
        return [Finding(what, f"{type(error).__name__}: {first}", FAIL, "mend what it says")]


def _answer(
    pipe: Connection, what: str, function: Callable[..., list[Finding]], arguments: tuple[Any, ...]
) -> None:
    """In a process of its own; what libraries print there is of no use."""
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    found = _tried((what, function, arguments))
    with suppress(BrokenPipeError):
        pipe.send(found)
