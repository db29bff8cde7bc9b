"""How much each tenant may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.core.config import OTHER_TENANTS, TenantConfig
from cluster.core.token_bucket import TokenBucket
from cluster.errors import QuotaExceeded

_MAX_IDLE = 4096
_CONCURRENCY_RETRY_S = 1.0


class Quotas:
    """The tenants' limits on requests per second, tokens per minute and requests at once, over all models. Tenants that
    are not listed have the limits of ``*`` each, or none.

    Each of several gateways enforces its part, the same for all. A request that comes with the quota nearly used up may
    use a little more: what it takes beyond its estimate is paid by the next ones.

    Pure: ``now`` is any monotonic clock in seconds. Not thread-safe.

    Args:
        tenants: those with limits.
        num_gateways: that serve the same tenants, this one included.
    """

    def __init__(self, tenants: Iterable[TenantConfig], num_gateways: Callable[[], int] = lambda: 1) -> None:
        self._configs = {tenant.name: tenant for tenant in tenants}
        self._num_gateways = num_gateways
        self._accounts: dict[str, _Account] = {}

    def config(self, tenant: str) -> TenantConfig | None:
        """What is configured for it; None: nothing."""
        return self._configs.get(tenant) or self._configs.get(OTHER_TENANTS)

    def enter(self, tenant: str, num_tokens: int, now: float) -> QuotaLease:
        """Charges a request's tokens, prompt and expected completion.

        Raises:
            QuotaExceeded: a quota is used up; nothing was charged.
        """
        config = self.config(tenant)
        if config is None or not config.is_limited:
            return QuotaLease(None, 0)
        account = self._accounts.get(tenant)
        if account is None:
            self._forget_idle(now)
            account = self._accounts[tenant] = _Account(config)
        account.scale(1.0 / max(self._num_gateways(), 1), now)
        account.take(num_tokens, now)
        return QuotaLease(account, num_tokens)

    def _forget_idle(self, now: float) -> None:
        if len(self._accounts) >= _MAX_IDLE:
            self._accounts = {name: account for name, account in self._accounts.items() if not account.is_idle(now)}


class QuotaLease:
    """A request's part of its tenant's quota."""

    def __init__(self, account: _Account | None, num_tokens: int) -> None:
        self._account = account
        self._num_tokens = num_tokens

    def correct(self, num_tokens: int, now: float) -> None:
        """What the request is expected to use, known better; in place of what was charged so far."""
        if self._account is not None:
            self._account.correct(num_tokens - self._num_tokens, now)
            self._num_tokens = num_tokens

    def release(self, num_tokens: int, now: float) -> None:
        """The request is over and has used so many. Once."""
        self.correct(num_tokens, now)
        if self._account is not None:
            self._account.num_running -= 1
            self._account = None

    def undo(self, now: float) -> None:
        """The request was refused by others: as if it had never come. Once."""
        if self._account is not None:
            self._account.give_back_request(now)
        self.release(0, now)


class _Account:
    """One tenant's use of its quota here."""

    def __init__(self, config: TenantConfig) -> None:
        self.num_running = 0
        self._config = config
        self._scale = 1.0
        self._requests: TokenBucket | None = None
        self._tokens: TokenBucket | None = None
        if config.requests_per_s is not None:
            self._requests = TokenBucket(config.requests_per_s, max(config.requests_per_s, 1.0))
        if config.tokens_per_min is not None:
            self._tokens = TokenBucket(config.tokens_per_min / 60.0, config.tokens_per_min)

    def scale(self, scale: float, now: float) -> None:
        if scale != self._scale:
            self._scale = scale
            for bucket in (self._requests, self._tokens):
                if bucket is not None:
                    bucket.scale(scale, now)

    def take(self, num_tokens: int, now: float) -> None:
        config = self._config
        if config.max_concurrent_requests is not None:
            limit = max(1, int(config.max_concurrent_requests * self._scale))
            if self.num_running >= limit:
                raise self._exceeded(f"{self.num_running} of its requests run, as many as may", _CONCURRENCY_RETRY_S)
        if self._requests is not None and (missing_s := self._requests.missing_s(1, now)) > 0:
            raise self._exceeded(f"it may send {config.requests_per_s:g} requests per second", missing_s)
        if self._tokens is not None and (missing_s := self._tokens.missing_s(num_tokens, now)) > 0:
            raise self._exceeded(
                f"it may use {config.tokens_per_min} tokens per minute, and this takes {num_tokens}", missing_s
            )
        if self._requests is not None:
            self._requests.take(1, now)
        self.correct(num_tokens, now)
        self.num_running += 1

    def correct(self, num_tokens: int, now: float) -> None:
        if self._tokens is not None and num_tokens > 0:
            self._tokens.take(num_tokens, now)
        elif self._tokens is not None and num_tokens < 0:
            self._tokens.give_back(-num_tokens, now)

    def give_back_request(self, now: float) -> None:
        if self._requests is not None:
            self._requests.give_back(1, now)

    def is_idle(self, now: float) -> bool:
        buckets = (self._requests, self._tokens)
        return self.num_running == 0 and all(bucket is None or bucket.is_full(now) for bucket in buckets)

    def _exceeded(self, what: str, retry_after_s: float) -> QuotaExceeded:
        part = "" if self._scale == 1.0 else f" (this gateway enforces {self._scale:.0%} of it)"
        return QuotaExceeded(
            f"the quota of the tenant is used up: {what}{part}; come back in {retry_after_s:.2f} s",
            retry_after_s=retry_after_s,
        )
