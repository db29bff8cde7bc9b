"""Who is let in: API keys, bearer tokens and certificates become callers, and nothing else does."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cluster.core.request import Priority
from cluster.errors import ConfigError, Unauthenticated
from cluster.gateway.auth import Authenticator
from cluster.gateway.caller import ANYONE, Caller
from cluster.gateway.callers_file import CallersFile, hash_api_key
from cluster.gateway.jwt_verifier import JwtVerifier
from cluster.gateway.security_config import AuthConfig, JwtConfig
from cluster.gateway.tls import ssl_peer

ISSUER, AUDIENCE = "https://issuer.example", "cluster"
SPIFFE_ID = "spiffe://example.org/web"


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


class Provider:
    """An identity provider: keys by id, and tokens signed with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = {"ec": ec.generate_private_key(ec.SECP256R1()), "rsa": rsa.generate_private_key(65537, 2048)}
        self.publish("ec", "rsa")

    def publish(self, *key_ids: str) -> None:
        keys = []
        for key_id in key_ids:
            algorithm = jwt.get_algorithm_by_name(self.algorithm(key_id))
            keys.append({**algorithm.to_jwk(self.keys[key_id].public_key(), as_dict=True), "kid": key_id, "use": "sig"})
        self.path.write_text(json.dumps({"keys": keys}))

    @staticmethod
    def algorithm(key_id: str) -> str:
        return "ES256" if key_id.startswith("ec") else "RS256"

    def token(self, key_id: str = "ec", headers: dict[str, str] | None = None, **claims: object) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "exp": time.time() + 60, **claims}
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, self.keys[key_id], self.algorithm(key_id), {"kid": key_id, **(headers or {})})

    @property
    def config(self) -> JwtConfig:
        return JwtConfig(jwks_file=str(self.path), issuer=ISSUER, audience=AUDIENCE)


@pytest.fixture
def provider(tmp_path: Path) -> Provider:
    return Provider(tmp_path / "jwks.json")


@pytest.fixture
def write_callers(tmp_path: Path) -> Callable[..., str]:
    def write(*entries: object) -> str:
        path = tmp_path / "callers.yaml"
        path.write_text(yaml.safe_dump(list(entries)))
        return str(path)

    return write


CreateCallers = Callable[..., str]


def test_without_configuration_everybody_is_welcome() -> None:
    authenticator = Authenticator(AuthConfig())
    assert not authenticator.is_required
    assert authenticator.authenticate({}) is ANYONE
    assert authenticator.authenticate(bearer("whatever")) is ANYONE
    # Behind mutual TLS the certificate says whose the call is; it makes nobody an administrator.
    assert authenticator.authenticate({}, SPIFFE_ID) == Caller(tenant=SPIFFE_ID, subject=SPIFFE_ID)


def test_callers_of_the_file(write_callers: CreateCallers) -> None:
    path = write_callers(
        {"subject": "batch", "tenant": "research", "key_sha256": hash_api_key("k1"), "max_priority": "P2",
         "models": ["demo"]},
        {"subject": "web", "certificate": SPIFFE_ID, "admin": True},
        {"subject": "old", "certificate": "build-server"},
    )  # fmt: skip
    authenticator = Authenticator(AuthConfig(callers_file=path))
    assert authenticator.is_required
    batch = Caller(
        tenant="research", subject="batch", max_priority=Priority.P2, models=frozenset({"demo"}), admin=False
    )
    assert authenticator.authenticate(bearer("k1")) == batch
    assert authenticator.authenticate({"authorization": "bEARER k1"}, "nobody") == batch
    assert authenticator.authenticate({}, SPIFFE_ID) == Caller(tenant="web", subject="web", admin=True)
    assert authenticator.authenticate({}, "build-server").subject == "old"


@pytest.mark.parametrize(
    ("metadata", "peer"),
    [
        ({}, ""),
        ({}, "spiffe://example.org/other"),
        (bearer("k2"), ""),
        (bearer(hash_api_key("k1")), ""),
        (bearer("k1x"), ""),
        (bearer(""), ""),
        ({"authorization": "k1"}, ""),
        ({"authorization": "Basic k1"}, ""),
        ({"authorization": b"Bearer k1"}, ""),
        # Who shows a wrong key is not let in by something else.
        (bearer("k2"), "web"),
        (bearer("\udcff"), ""),
    ],
)
def test_deny_by_default(write_callers: CreateCallers, metadata: dict[str, str | bytes], peer: str) -> None:
    path = write_callers(
        {"subject": "batch", "key_sha256": hash_api_key("k1")}, {"subject": "web", "certificate": "web"}
    )
    with pytest.raises(Unauthenticated) as caught:
        Authenticator(AuthConfig(callers_file=path)).authenticate(metadata, peer)
    assert "k2" not in caught.value.message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "valid tuple"),
        ("a: 1", "valid tuple"),
        ("[", "not valid YAML"),
        ("- subject: a", "either key_sha256 or certificate"),
        (f"- {{subject: a, certificate: b, key_sha256: {'a' * 64}}}", "either key_sha256 or certificate"),
        ("- {subject: a, key_sha256: my-secret-key}", "0.key_sha256: must be 64"),
        ("- {subject: a, key: my-secret-key}", "0.key"),
        ("- {certificate: b}", "0.subject"),
        ("- {subject: a, certificate: b, max_priority: P7}", "0.max_priority"),
        ("- {subject: a, certificate: b}\n- {subject: c, certificate: b}", "'a'"),
    ],
)
def test_a_file_of_callers_that_makes_no_sense(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "callers.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=problem) as caught:
        CallersFile(str(path))
    assert caught.value.field == "gateway.auth.callers_file"
    assert str(path) in caught.value.message
    assert "my-secret-key" not in caught.value.message


def test_the_file_is_read_again(write_callers: CreateCallers, caplog: pytest.LogCaptureFixture) -> None:
    path = write_callers({"subject": "a", "key_sha256": hash_api_key("k1")})
    callers = CallersFile(path, check_interval_s=0)
    write_callers({"subject": "b", "key_sha256": hash_api_key("k2")})
    assert callers.by_key("k1") is None
    assert callers.by_key("k2") == Caller(tenant="b", subject="b")
    # A mistake, and then no file at all: what was good stays, and it is told once.
    Path(path).write_text("nonsense")
    assert callers.by_key("k2") is not None
    assert callers.by_key("k2") is not None
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    os.unlink(path)
    assert callers.by_key("k2") is not None
    write_callers({"subject": "c", "key_sha256": hash_api_key("k3")})
    assert callers.by_key("k2") is None
    assert callers.by_key("k3") is not None


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read: No such file"):
        Authenticator(AuthConfig(callers_file=str(tmp_path / "missing.yaml")))


@pytest.mark.parametrize("key_id", ["ec", "rsa"])
def test_bearer_tokens(provider: Provider, key_id: str) -> None:
    verifier = JwtVerifier(provider.config)
    assert verifier.verify(provider.token(key_id)) == Caller(tenant="ann", subject="ann")
    token = provider.token(key_id, tenant="research", scope="read cluster.admin", aud=["x", AUDIENCE])
    assert verifier.verify(token) == Caller(tenant="research", subject="ann", admin=True)
    # Clocks differ a little.
    verifier.verify(provider.token(key_id, exp=time.time() - 10, nbf=time.time() + 10))


def test_tokens_that_do_not_count(provider: Provider) -> None:
    verifier = JwtVerifier(provider.config)
    other = Provider(provider.path.with_name("other.json"))
    now = time.time()
    bad = {
        "expired": provider.token(exp=now - 60),
        "not yet": provider.token(nbf=now + 60),
        "for ever": provider.token(exp=None),
        "of nobody": provider.token(sub=None),
        "for another": provider.token(aud="billing"),
        "without audience": provider.token(aud=None),
        "of another issuer": provider.token(iss="https://evil.example"),
        "signed by another": other.token(),
        "unknown key": provider.token(headers={"kid": "ec2"}),
        "tenant is no text": provider.token(tenant=["a"]),
        "scope is no text": provider.token(scope=["cluster.admin"]),
        "the other key's name": provider.token("ec", headers={"kid": "rsa"}),
        "unsigned": jwt.encode({"sub": "ann", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 60}, "", "none"),
        # The public key as a shared secret: what is verified by it must not be signed with it.
        "symmetric": jwt.encode(
            {"sub": "ann", "iss": ISSUER, "aud": AUDIENCE, "exp": now + 60}, "k" * 64, "HS256", {"kid": "rsa"}
        ),
        "nothing": "",
        "no token": "abc",
        "two parts": "abc.def",
    }
    for name, token in bad.items():
        with pytest.raises(Unauthenticated) as caught:
            print(name, verifier.verify(token))
        assert not token or token not in caught.value.message


def test_tokens_with_flipped_bits(provider: Provider) -> None:
    verifier, token, rng = JwtVerifier(provider.config), provider.token(tenant="research"), random.Random(7)
    body, _, signature = token.rpartition(".")
    for _ in range(200):
        position = rng.randrange(len(body))
        flipped = body[:position] + chr(ord(body[position]) ^ 1 << rng.randrange(7)) + body[position + 1 :]
        with pytest.raises(Unauthenticated):
            verifier.verify(f"{flipped}.{signature}")


def test_keys_are_read_again(provider: Provider) -> None:
    provider.keys["ec-2"] = ec.generate_private_key(ec.SECP256R1())
    verifier = JwtVerifier(provider.config, check_interval_s=0)
    with pytest.raises(Unauthenticated):
        verifier.verify(provider.token("ec-2"))
    provider.publish("ec-2")
    assert verifier.verify(provider.token("ec-2")).subject == "ann"
    with pytest.raises(Unauthenticated):
        verifier.verify(provider.token("ec"))
    # The only key needs no name.
    assert verifier.verify(provider.token("ec-2", headers={"kid": ""})).subject == "ann"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}]}', '{"keys": [1]}'],
)
def test_a_key_set_that_cannot_be_used(provider: Provider, content: str) -> None:
    provider.path.write_text(content)
    with pytest.raises(ConfigError, match=r"jwks\.json") as caught:
        JwtVerifier(provider.config)
    assert caught.value.field == "gateway.auth.jwt.jwks_file"


def test_keys_and_tokens_together(provider: Provider, write_callers: CreateCallers) -> None:
    path = write_callers({"subject": "batch", "key_sha256": hash_api_key("k1")})
    authenticator = Authenticator(AuthConfig(callers_file=path, jwt=provider.config))
    assert authenticator.authenticate(bearer("k1")).subject == "batch"
    assert authenticator.authenticate(bearer(provider.token())).subject == "ann"
    for metadata in (bearer("k2"), {}):
        with pytest.raises(Unauthenticated):
            authenticator.authenticate(metadata)


def test_tokens_alone_know_no_certificates(provider: Provider) -> None:
    with pytest.raises(Unauthenticated):
        Authenticator(AuthConfig(jwt=provider.config)).authenticate({}, "ann")


@pytest.mark.parametrize(
    ("uris", "common_name", "peer"),
    [
        ([SPIFFE_ID], "web", SPIFFE_ID),
        ([], "web", "web"),
        (["https://example.org"], "web", "web"),
        ([SPIFFE_ID, "spiffe://example.org/other"], "web", ""),
        ([], SPIFFE_ID, ""),
    ],
)
def test_whom_a_certificate_names(uris: list[str], common_name: str, peer: str) -> None:
    certificate = {
        "subject": ((("organizationName", "x"),), (("commonName", common_name),)),
        "subjectAltName": (("DNS", "web.example.org"), *(("URI", uri) for uri in uris)),
    }
    assert ssl_peer(certificate) == peer
    assert ssl_peer(None) == ssl_peer({}) == ""
