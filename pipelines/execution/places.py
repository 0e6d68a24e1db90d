"""Places on a cluster: a folder that only the process of the command can see is lost or empty for the others."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pipelines.config.ray_section import RaySection
from pipelines.errors import UserError
from pipelines.stores import SCHEMES

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it in the process of a submitted job
MOUNTS = Path("/proc/self/mounts")
SHARED = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "gpfs", "beegfs", "glusterfs", "afs", "9p",
    "virtiofs", "pvfs2", "orangefs",
}  # fmt: skip
SQLITE = "sqlite:///"


def check_places(section: RaySection, places: Mapping[str, str]) -> None:
    """Check that other machines can see the places of a command that runs on a cluster, or that they outlive it.

    The folder of a submitted job and its temporary files are removed with the cluster. A local folder of another
    machine than that of the cluster is visible to the workers only on a file system of the network.

    Args:
        section: How Ray runs.
        places: Key → address of a folder or an SQLite file. Addresses of servers and object storage always pass.

    Raises:
        UserError: For the places that only this job can see.
    """
    address = section.address or os.environ.get("RAY_ADDRESS", "")
    submitted = JOB in os.environ
    if not submitted and (not address or _is_here(address)):
        return
    private = {key: place for key, place in places.items() if _is_private(place, submitted)}
    if private:
        raise UserError(
            f"only this job can see {', '.join(private)}: its results would be lost or not found by workers",
            where=", ".join(f"{key} = {place}" for key, place in private.items()),
            remedy="set ray.storage and ray.tracking_uri in ray_config.yaml, or each key, to a place that all "
            f"machines can see (a shared folder, or {SCHEMES}); --local-ok accepts them as they are",
            wrong_use=True,
        )


def _is_private(place: str, submitted: bool) -> bool:
    path = place.removeprefix(SQLITE).removeprefix("file://")
    if not path or path == "none" or "://" in path:
        return False
    whole = Path(path).expanduser().absolute()
    if submitted:
        folders = [Path(tempfile.gettempdir()), Path.cwd()]
        return any(whole.is_relative_to(folder.resolve()) or whole.is_relative_to(folder) for folder in folders)
    return not _is_shared(whole)


def _is_shared(path: Path) -> bool:
    """Whether a path is on a file system of the network."""
    best, kind = Path("/"), ""
    for line in MOUNTS.read_text(encoding="utf-8").splitlines() if MOUNTS.exists() else ():
        _, mounted, found, *_ = line.split(" ")
        at = Path(mounted.encode().decode("unicode_escape"))
        if path.is_relative_to(at) and len(at.parts) >= len(best.parts):
            best, kind = at, found
    return kind in SHARED or kind.startswith("fuse.")


def _is_here(address: str) -> bool:
    """Whether an address is one of this machine, or a word that looks for a cluster on it."""
    host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
    if not host:
        return True
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((host, 0))  # only an address of this machine can be bound
    except OSError:
        return False
    return True
