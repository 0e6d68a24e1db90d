"""Which process wrote a file or a tag, and whether that process has ended for certain."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Host, process id and start of this process, as values for JSON."""
    return {"host": host(), "pid": os.getpid(), "started": _started(os.getpid())}


def host() -> str:
    """The machine and its process namespace. Containers with one host name have their own process ids."""
    space = Path("/proc/self/ns/pid")
    return socket.gethostname() + (f"/{space.stat().st_ino}" if space.exists() else "")


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether a process of this machine does not run any more; False for those of other machines.

    Args:
        process: As `this_process` returned it. Without `started`, another process can have taken its id.
    """
    pid, held = process.get("pid"), process.get("host")
    if held != host() or not isinstance(pid, int) or pid < 1:
        return False
    return not _runs(pid) or process.get("started", _started(pid)) != _started(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _started(pid: int) -> str:
    """Boot of the machine and clock ticks from it to the start of a process; empty where this is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"{boot}/{stat.rpartition(')')[2].split()[19]}"
