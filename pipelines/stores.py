"""Stores: the kinds of addresses of object storage and HDFS, and the file systems of pyarrow that open them.

Credentials come from the standard chain of each store on each machine. They are never written or sent, and an
address that carries credentials is refused. `s3://` is tested against S3 servers. `gs://`, `abfs://` and `hdfs://`
are tested with a file system in memory in place of pyarrow's; they have not been seen on a real service.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from pipelines.errors import UserError

S3_ATTEMPTS = 6  # with growing pauses between them: a server counts as down after about twenty seconds
AZURE_DOMAIN = "dfs.core.windows.net"
DEFAULT_HDFS = "default"  # pyarrow's name for fs.defaultFS of core-site.xml


@dataclass(frozen=True)
class Store:
    """A kind of storage.

    Args:
        name: Its name in messages.
        form: How an address is written.
        unit: What the first part of a path is called; empty if it is a folder like any other.
        check: What to check when the storage cannot be used.
        credentials: Where credentials belong in place of an address.
        whole: Whether a reader never sees a file that is still being written. Otherwise files are written under
            another name and then renamed.
        replaces: Whether a file that is replaced is there all the time.
        seen: Whether it has been tested on a real server.
    """

    name: str
    form: str
    unit: str
    check: str
    credentials: str
    whole: bool = True
    replaces: bool = True
    seen: bool = False


STORES: Mapping[str, Store] = {
    "s3": Store(
        "Amazon S3", "s3://bucket/path", "bucket",
        "check the bucket, AWS_ENDPOINT_URL and the AWS credentials of this machine",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", seen=True,
    ),
    "gs": Store(
        "Google Cloud Storage", "gs://bucket/path", "bucket",
        "check the bucket and the Google credentials of this machine (GOOGLE_APPLICATION_CREDENTIALS)",
        "set GOOGLE_APPLICATION_CREDENTIALS",
    ),
    "abfs": Store(
        "Azure Data Lake Storage", f"abfs://container@account.{AZURE_DOMAIN}/path", "container",
        "check the container, the account (with a hierarchical namespace), and the Azure credentials of this "
        "machine (AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, az login, or its managed identity)",
        "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN", whole=False,
    ),
    "hdfs": Store(
        "HDFS", "hdfs://namenode:port/path", "",
        "check the name node, and the Hadoop client of this machine (HADOOP_HOME, JAVA_HOME, CLASSPATH, kinit)",
        "use the login of this machine: HADOOP_USER_NAME, or kinit", whole=False, replaces=False,
    ),
}  # fmt: skip
SCHEMES = ", ".join(f"{scheme}://" for scheme in STORES)
FORMS = f"a local path or {', '.join(store.form for store in STORES.values())}"
UNSEEN = "is tested with a file system in memory alone, not with the real service"
_ALIASES = {"abfss": "abfs", "gcs": "gs"}


@dataclass(frozen=True)
class Address:
    """The parts of an address of a store; `endpoint` is its server, or empty for the usual one."""

    scheme: str
    path: str
    endpoint: str


def parse(uri: str) -> Address:
    """The parts of an address with a scheme.

    Raises:
        UserError: For an unknown scheme, an address that carries credentials, and one without bucket or account.
    """
    scheme, _, rest = uri.partition("://")
    scheme = _ALIASES.get(scheme, scheme)
    if scheme not in STORES:
        raise _wrong(f"cannot open an address of the kind {scheme}://", uri, f"use {FORMS}")
    store = STORES[scheme]
    first, _, key = rest.partition("/")
    user, at, host = first.rpartition("@")
    if at and (scheme != "abfs" or ":" in user):
        shown = f"{scheme}://…@{rest.rsplit('@', 1)[1]}"
        raise _wrong("an address must not carry credentials", shown, f"remove them and {store.credentials}")
    if scheme == "hdfs":
        return Address(scheme, f"/{key}".rstrip("/") or "/", first or DEFAULT_HDFS)
    if not (user or first if scheme == "abfs" else first):
        raise _wrong(f"the address names no {store.unit}", uri, f"write {store.form}")
    unit = user if at else first
    endpoint = _azure_host(host if at else "", uri) if scheme == "abfs" else _endpoint(scheme)
    return Address(scheme, f"{unit}/{key}".rstrip("/"), endpoint)


def written(scheme: str, path: str, endpoint: str) -> str:
    """The address of a path of a store; the inverse of `parse`, but for servers that the environment names."""
    if scheme == "abfs":
        unit, separator, key = path.partition("/")
        return f"abfs://{unit}@{endpoint}{separator}{key}"
    if scheme == "hdfs":
        return f"hdfs://{'' if endpoint == DEFAULT_HDFS else endpoint}{path}"
    return f"{scheme}://{path}"


def _wrong(what: str, uri: str, remedy: str) -> UserError:
    return UserError(what, where=uri, remedy=remedy, wrong_use=True)


def _endpoint(scheme: str) -> str:
    """The server that the environment names in place of the usual one."""
    names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "gs": ("STORAGE_EMULATOR_HOST",)}[scheme]
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _azure_host(host: str, uri: str) -> str:
    """The host of an account, from the address or `AZURE_STORAGE_ACCOUNT_NAME`."""
    host = host or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not host:
        raise _wrong(
            "the address names no storage account",
            uri,
            f"write {STORES['abfs'].form}, or set AZURE_STORAGE_ACCOUNT_NAME",
        )
    return host if "." in host else f"{host}.{AZURE_DOMAIN}"


@lru_cache
def filesystem(scheme: str, endpoint: str) -> pafs.FileSystem:
    """The client of a store. Each process has one for each server.

    Raises:
        OSError: When the store cannot be reached or its client cannot be loaded.
    """
    return _OPENED[scheme](endpoint)


def _s3(endpoint: str) -> pafs.FileSystem:
    """It repeats requests that fail and gives up on a silent server."""
    parts = urlsplit(endpoint)
    return pafs.S3FileSystem(
        endpoint_override=parts.netloc or None,
        scheme=parts.scheme or "https",
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=S3_ATTEMPTS),
        connect_timeout=10,
        request_timeout=60,
        allow_delayed_open=True,  # a small file is one request, not three
    )


def _gs(endpoint: str) -> pafs.FileSystem:
    from datetime import timedelta

    parts = urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
    emulated = {"endpoint_override": parts.netloc, "scheme": parts.scheme, "anonymous": True} if endpoint else {}
    return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=20), **emulated)


def _abfs(endpoint: str) -> pafs.FileSystem:
    account, _, domain = endpoint.partition(".")
    given: dict[str, Any] = {"account_name": account}
    for name, variable in (("account_key", "AZURE_STORAGE_ACCOUNT_KEY"), ("sas_token", "AZURE_STORAGE_SAS_TOKEN")):
        if value := os.environ.get(variable):
            given[name] = value
            break  # one of them alone is allowed; without, pyarrow uses Azure's default chain
    if domain != AZURE_DOMAIN:  # a national cloud
        given |= {"dfs_storage_authority": f".{domain}"}
        given |= {"blob_storage_authority": f".{domain.replace('dfs.', 'blob.', 1)}"}
    return pafs.AzureFileSystem(**given)


def _hdfs(endpoint: str) -> pafs.FileSystem:
    host, _, port = endpoint.partition(":")
    # the port of a logical name of several name nodes is 0
    return pafs.HadoopFileSystem(host, int(port or 0), user=os.environ.get("HADOOP_USER_NAME"))


_OPENED: Mapping[str, Callable[[str], pafs.FileSystem]] = {"s3": _s3, "gs": _gs, "abfs": _abfs, "hdfs": _hdfs}
