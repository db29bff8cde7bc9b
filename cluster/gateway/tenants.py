"""What callers may use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from cluster.core.config import TenantConfig
from cluster.core.quotas import Quotas
from cluster.core.request import Priority
from cluster.errors import Forbidden
from cluster.gateway.caller import Caller


class Tenants:
    """The models and classes of callers, by their credentials and by what is configured for their tenants; and the
    tenants' quotas. One for all models of a gateway.

    Args:
        configs: tenants with limits.
        num_gateways: that serve the same tenants, this one included.
    """

    def __init__(self, configs: Iterable[TenantConfig] = (), num_gateways: Callable[[], int] = lambda: 1) -> None:
        self.quotas = Quotas(configs, num_gateways)

    def check_model(self, caller: Caller, model: str) -> None:
        """Raises Forbidden where the caller may not use it."""
        config = self.quotas.config(caller.tenant)
        tenants_models = None if config is None else config.models
        if any(models is not None and model not in models for models in (caller.models, tenants_models)):
            raise Forbidden(f"{self._name(caller)} may not use model {model!r}", field="model")

    def priority(self, caller: Caller, asked: Priority | None) -> Priority:
        """The class of a request; None asks for P1, or the caller's most urgent one where that is less urgent.

        Raises:
            Forbidden: the caller may not use it.
        """
        config = self.quotas.config(caller.tenant)
        highest = caller.max_priority if config is None else max(caller.max_priority, Priority[config.max_priority])
        if asked is None:
            return max(Priority.P1, highest)
        if asked < highest:
            raise Forbidden(
                f"{self._name(caller)} may use class {highest.name} and less urgent ones, not {asked.name}",
                field="priority",
            )
        return asked

    @staticmethod
    def _name(caller: Caller) -> str:
        return f"tenant {caller.tenant!r}" if caller.tenant else "the caller"
