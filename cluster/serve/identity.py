"""What the actors of one cluster share."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.serve.cluster_certificate import ClusterCertificate
from cluster.serve.config import LoggingConfig


@dataclass(frozen=True, kw_only=True)
class ClusterIdentity:
    """Handed to every actor of a cluster.

    Attributes:
        secret: opens replicas to gateways.
        start_id: key of the start-up reports; None: nobody waits for them.
        logging: of all of them.
        replica_host: address that replicas bind; None: their node's.
        certificate: of the streams between gateways and replicas; None: they have no TLS, as on loopback.
    """

    secret: str
    start_id: str | None
    logging: LoggingConfig
    replica_host: str | None = None
    certificate: ClusterCertificate | None = None

    def __repr__(self) -> str:  # the secret must not end up in a log
        return f"ClusterIdentity(start_id={self.start_id!r})"
