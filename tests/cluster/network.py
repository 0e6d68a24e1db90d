"""Network policies of Kubernetes: whether one endpoint may connect to another."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "dmtg"


@dataclass(frozen=True)
class Endpoint:
    """A pod with labels in a namespace with labels, or an address outside of all pods."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = OURS
    namespace_labels: Mapping[str, str] = field(default_factory=dict)
    address: str = ""

    @property
    def isolated(self) -> bool:
        """Whether policies of our namespace apply to it."""
        return not self.address and self.namespace == OURS


def allowed(policies: Sequence[Mapping[str, Any]], source: Endpoint, target: Endpoint, port: int) -> bool:
    """Whether the policies allow a connection: the egress of its source and the ingress of its target do.

    Args:
        policies: All policies of our namespace.
        source: Endpoint that connects.
        target: Endpoint that listens.
        port: Port of the target.
    """
    return _side(policies, "Egress", source, target, port) and _side(policies, "Ingress", target, source, port)


def _side(
    policies: Sequence[Mapping[str, Any]], direction: str, pod: Endpoint, other: Endpoint, port: int
) -> bool:
    own = [one["spec"] for one in policies if direction in one["spec"]["policyTypes"]]
    own = [spec for spec in own if pod.isolated and _has(spec["podSelector"], pod.labels)]
    peers = "to" if direction == "Egress" else "from"
    rules = [rule for spec in own for rule in spec.get(direction.lower(), [])]
    return not own or any(
        (peers not in rule or any(_is(peer, other) for peer in rule[peers]))
        and ("ports" not in rule or port in [held["port"] for held in rule["ports"]])
        for rule in rules
    )


def _is(peer: Mapping[str, Any], other: Endpoint) -> bool:
    if "ipBlock" in peer:
        found = ipaddress.ip_address(other.address) if other.address else None
        block = peer["ipBlock"]
        return (
            found is not None
            and found in ipaddress.ip_network(block["cidr"])
            and not any(found in ipaddress.ip_network(inner) for inner in block.get("except", []))
        )
    if other.address:
        return False
    if "namespaceSelector" in peer:
        named = {"kubernetes.io/metadata.name": other.namespace, **other.namespace_labels}
        right = _has(peer["namespaceSelector"], named)
    else:
        right = other.namespace == OURS
    return right and _has(peer.get("podSelector", {}), other.labels)


def _has(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return bool(selector.get("matchLabels", {}).items() <= labels.items())
