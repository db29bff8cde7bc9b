"""Bearer tokens that an identity provider has signed."""

from __future__ import annotations

from collections.abc import Mapping

import jwt

from cluster.errors import ConfigError, Unauthenticated
from cluster.gateway.caller import Caller
from cluster.gateway.security_config import JwtConfig
from cluster.gateway.watched_files import WatchedFiles

_FIELD = "gateway.auth.jwt.jwks_file"
# Signatures that are verified by a public key. With a symmetric one, whoever can verify can also sign.
_ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"})


class JwtVerifier:
    """Callers out of JSON Web Tokens.

    Raises:
        ConfigError: the file of keys cannot be read, or holds none that can be used.
    """

    def __init__(self, config: JwtConfig, *, check_interval_s: float = 1.0) -> None:
        self._config = config
        self._keys = WatchedFiles([config.jwks_file], self._parse, field=_FIELD, check_interval_s=check_interval_s)

    def verify(self, token: str) -> Caller:
        """The caller that ``token`` names.

        Raises:
            Unauthenticated: it is none of the provider's for us, or has expired.
        """
        config = self._config
        try:
            key = self._key_of(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=config.audience,
                issuer=config.issuer,
                leeway=config.leeway_s,
                options={"require": ["exp", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the bearer token has expired: get a new one") from None
        except jwt.PyJWTError:
            raise Unauthenticated("the bearer token is not valid here") from None
        subject, tenant = claims["sub"], claims.get(config.tenant_claim, "")
        scope = claims.get("scope", "")
        if not isinstance(tenant, str) or not isinstance(scope, str):
            raise Unauthenticated(f"the bearer token's {config.tenant_claim} and scope must be texts")
        return Caller(tenant=tenant or subject, subject=subject, admin=config.admin_scope in scope.split())

    def _key_of(self, token: str) -> jwt.PyJWK:
        keys = self._keys.current()
        key_id = jwt.get_unverified_header(token).get("kid", "")
        if not key_id and len(keys) == 1:
            return next(iter(keys.values()))
        try:
            return keys[key_id]
        except KeyError:
            raise jwt.InvalidKeyError from None

    def _parse(self, content: bytes) -> Mapping[str, jwt.PyJWK]:
        path = self._config.jwks_file
        try:
            found = jwt.PyJWKSet.from_json(content.decode()).keys
        except (ValueError, AttributeError, TypeError, jwt.PyJWTError) as error:
            raise ConfigError(f"{path} is no JSON Web Key Set that can be used: {error}", field=_FIELD) from None
        keys = {key.key_id or "": key for key in found if key.algorithm_name in _ALGORITHMS}
        if not keys:
            kinds = ", ".join(sorted({key.algorithm_name for key in found}))
            raise ConfigError(f"{path} has no public key for signatures, only for {kinds}", field=_FIELD)
        return keys
