"""The certificate by which the gateways and replicas of one cluster know each other."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cluster.gateway.replica_channel import REPLICA_TLS_NAME

_CLOCK_SKEW = timedelta(days=1)  # between nodes
_LIFETIME = timedelta(days=3650)  # made anew at every start; no cluster runs that long


@dataclass(frozen=True, kw_only=True)
class ClusterCertificate:
    """Made at start and handed to every actor: one certificate that each end shows, and the only one it trusts.

    Attributes:
        certificate: PEM, signed by its own key.
        key: PEM.
    """

    certificate: bytes
    key: bytes

    def __repr__(self) -> str:  # the key must not end up in a log
        return "ClusterCertificate()"

    @classmethod
    def create(cls) -> ClusterCertificate:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, REPLICA_TLS_NAME)])
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(REPLICA_TLS_NAME)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(
            certificate=certificate.public_bytes(Encoding.PEM),
            key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """A gateway's end."""
        return grpc.ssl_channel_credentials(self.certificate, self.key, self.certificate)

    def server_credentials(self) -> grpc.ServerCredentials:
        """A replica's end: whoever does not show the certificate gets no further than the handshake."""
        return grpc.ssl_server_credentials([(self.key, self.certificate)], self.certificate, require_client_auth=True)
