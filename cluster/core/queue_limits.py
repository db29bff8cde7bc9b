"""How much may wait, and who gives way where more comes."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.core.config import AdmissionConfig, ClassesConfig
from cluster.core.fair_queue import FairQueue, QueuedRequest
from cluster.core.request import Priority

_Size = tuple[int, int]  # requests, tokens


class QueueLimits:
    """Bounds in requests and in tokens, of each class and of all together. Each class may have its share of the whole
    in any case. Beyond that, room is made by

    1. the lowest class that has more than its share, if it is lower than the one that comes, or that one stays within
       its share;
    2. tenants of the same class that have more than the one that comes.

    The newest go first, and only if that makes room. A class of which nothing waits may have one request of any number
    of tokens.

    Args:
        config: bounds of all classes together.
        classes: their shares and own bounds.
        queues: of all classes; ``make_room`` takes out of them who gives way.
    """

    def __init__(self, config: AdmissionConfig, classes: ClassesConfig, queues: Mapping[Priority, FairQueue]) -> None:
        self._whole: _Size = (config.max_queued_requests, config.max_queued_tokens)
        by_priority = classes.by_priority()
        self._own: dict[Priority, _Size] = {
            priority: (
                each.max_queued_requests or config.max_queued_requests,
                each.max_queued_tokens or config.max_queued_tokens,
            )
            for priority, each in by_priority.items()
        }
        self._guaranteed = {
            priority: tuple(int(each.share * limit) for limit in self._whole) for priority, each in by_priority.items()
        }
        self._queues = queues

    def make_room(self, priority: Priority, tenant: str, size: _Size) -> list[QueuedRequest] | None:
        """Takes out who has to go so that a tenant's requests of a class may grow by ``size``, requests and tokens;
        None: there is no room, and nobody goes."""
        resources = (0,) if self._queues[priority].num_requests + size[0] <= 1 else (0, 1)
        if all(self._has_room(priority, size, resource) for resource in resources):
            return []
        if not all(self._can_make_room(priority, tenant, size, resource) for resource in resources):
            return None
        removed: list[QueuedRequest] = []
        for resource in resources:
            while self._own_excess(priority, size, resource) > 0:
                removed.append(self._remove(priority, resource))
            while self._whole_excess(size, resource) > 0:
                spare = self._spare(priority, size, resource)
                removed.append(self._remove(max(spare, default=priority), resource))
        return removed

    def _has_room(self, priority: Priority, size: _Size, resource: int) -> bool:
        return self._own_excess(priority, size, resource) <= 0 and self._whole_excess(size, resource) <= 0

    def _can_make_room(self, priority: Priority, tenant: str, size: _Size, resource: int) -> bool:
        own_excess = self._own_excess(priority, size, resource)
        whole_excess = self._whole_excess(size, resource)
        of_own = self._queues[priority].num_removable(tenant, size)[resource]
        of_others = sum(self._spare(priority, size, resource).values())
        return own_excess <= of_own and whole_excess <= of_own + of_others

    def _held(self, priority: Priority, resource: int) -> int:
        queue = self._queues[priority]
        return queue.num_tokens if resource else queue.num_requests

    def _own_excess(self, priority: Priority, size: _Size, resource: int) -> int:
        """By how much the class would be beyond its own bound."""
        return self._held(priority, resource) + size[resource] - self._own[priority][resource]

    def _whole_excess(self, size: _Size, resource: int) -> int:
        """By how much all classes together would be beyond theirs."""
        held = 0
        for queue in self._queues.values():
            held += queue.num_tokens if resource else queue.num_requests
        return held + size[resource] - self._whole[resource]

    def _spare(self, priority: Priority, size: _Size, resource: int) -> dict[Priority, int]:
        """What other classes have beyond their shares that this one may take."""
        within_share = self._held(priority, resource) + size[resource] <= self._guaranteed[priority][resource]
        return {
            each: spare
            for each in Priority
            if (each > priority or (within_share and each is not priority))
            and (spare := self._held(each, resource) - self._guaranteed[each][resource]) > 0
        }

    def _remove(self, priority: Priority, resource: int) -> QueuedRequest:
        queue = self._queues[priority]
        request = queue.newest(by_tokens=bool(resource))
        queue.remove(request)
        return request
