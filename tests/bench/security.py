"""Certificates and a token for a gateway with mutual TLS and JWT, made anew."""

from __future__ import annotations

import json
import ssl
import sys
import time
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from certificates import Authority

_ISSUER, _AUDIENCE, _KEY_ID = "https://issuer.example", "cluster", "bench"


class MutualTls:
    """What both ends need.

    Attributes:
        config: of the gateway.
        metadata: of each call.
        context: of a client's connection.
        credentials: of a client's channel.

    Args:
        directory: gets the files; they are read as long as the gateway runs.
    """

    def __init__(self, directory: Path) -> None:
        authority, key = Authority(), ec.generate_private_key(ec.SECP256R1())
        server, client = authority.issue("gateway"), authority.issue("", "spiffe://example.org/bench")
        for name, data in (
            ("ca.pem", authority.pem),
            ("server.pem", server.certificate),
            ("server.key", server.key),
            ("client.pem", client.certificate),
            ("client.key", client.key),
        ):
            (directory / name).write_bytes(data)
        public = jwt.get_algorithm_by_name("ES256").to_jwk(key.public_key(), as_dict=True)
        (directory / "jwks.json").write_text(json.dumps({"keys": [{**public, "kid": _KEY_ID, "use": "sig"}]}))
        claims = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": "bench", "exp": time.time() + 86_400}
        token = jwt.encode(claims, key, "ES256", {"kid": _KEY_ID})
        self.metadata = (("authorization", f"Bearer {token}"),)
        self.context = ssl.create_default_context(cafile=str(directory / "ca.pem"))
        self.context.load_cert_chain(str(directory / "client.pem"), str(directory / "client.key"))
        self.credentials = grpc.ssl_channel_credentials(authority.pem, client.key, client.certificate)
        self.config: dict[str, Any] = {
            "tls": {
                "certificate_file": str(directory / "server.pem"),
                "key_file": str(directory / "server.key"),
                "client_ca_file": str(directory / "ca.pem"),
            },
            "auth": {
                "jwt": {"jwks_file": str(directory / "jwks.json"), "issuer": _ISSUER, "audience": _AUDIENCE},
            },
        }
