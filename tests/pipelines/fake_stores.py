"""File systems in memory in place of pyarrow's for Google, Azure and HDFS, whose services are not here."""

from __future__ import annotations

from io import BytesIO
from typing import Any, ClassVar

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import stores

UNSEEN = {
    "gs": "gs://bucket",
    "abfs": "abfs://bucket@account.dfs.core.windows.net",
    "hdfs": "hdfs://name:8020/bucket",
}


def use_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open every store of `UNSEEN` in memory, with an empty folder or bucket `bucket`, until the test ends."""
    opened = {scheme: _in_memory(scheme) for scheme in UNSEEN}
    before = stores.filesystem

    def filesystem(scheme: str, endpoint: str) -> Any:
        return opened[scheme] if scheme in opened else before(scheme, endpoint)

    monkeypatch.setattr(stores, "filesystem", filesystem)


def _in_memory(scheme: str) -> pafs.FileSystem:
    class Memory(MemoryFileSystem):
        store: ClassVar[dict[str, Any]] = {}
        pseudo_dirs: ClassVar[list[str]] = [""]

        def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
            # all readers of a file in memory would share one position
            return BytesIO(self.cat_file(path)) if mode == "rb" else super()._open(path, mode, **more)

    held = Memory(skip_instance_cache=True)
    opened = pafs.PyFileSystem(pafs.FSSpecHandler(held))
    if scheme == "hdfs":
        held.mkdir("/bucket")
        return opened
    held.mkdir("/account/bucket")  # paths of buckets do not begin with a slash
    return pafs.SubTreeFileSystem("/account", opened)
