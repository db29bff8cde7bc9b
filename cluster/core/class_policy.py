"""Whose turn it is, by the classes' shares and latency targets."""

from __future__ import annotations

from collections.abc import Container, Mapping

from cluster.core.config import ClassesConfig
from cluster.core.request import Priority


class ClassPolicy:
    """Weighted fair queueing with borrowing, in tokens, over classes whose latency targets order what is due.

    Every class has a *balance*: the tokens that it is owed, or has borrowed where it is negative. Service is the clock:
    whenever a class is served ``n`` tokens, each class earns its share of ``n``, and the one served pays ``n``. Next is

    1. a class that is owed ``burst_tokens`` or more: whoever waits gets there, whatever else comes;
    2. else a class *within its share*, balance at least 0;
    3. else the most urgent class: what nobody is owed goes there.

    Among several of the first two kinds the earliest deadline goes first, arrival plus target. So a class within its
    share is not touched by what others ask for beyond theirs, a class beyond its share gets all that is left over, and
    each that waits gets its share at least, P3 too.

    A balance stays within ``burst_tokens`` of 0, or the largest single charge: what was borrowed while nobody else
    wanted it need not be paid back for ever. A class that does not wait earns up to 0: it pays its debts and saves
    nothing up.

    The order of lending is that of hierarchical token buckets (Devera, 2002), with service in place of time, so that it
    holds at any speed. Pure, and not about any queue in particular.

    Args:
        classes: shares and targets.
        burst_tokens: how much a class may get at once before its share is looked at, about the largest charge.
    """

    def __init__(self, classes: ClassesConfig, *, burst_tokens: int) -> None:
        by_priority = classes.by_priority()
        self._shares = {priority: by_priority[priority].share for priority in Priority}
        self._targets_s = {priority: by_priority[priority].target_s for priority in Priority}
        self._burst_tokens = float(burst_tokens)
        self._balances = dict.fromkeys(Priority, 0.0)

    def share(self, priority: Priority) -> float:
        """Its guaranteed part, in (0, 1]."""
        return self._shares[priority]

    def balance(self, priority: Priority) -> float:
        """Tokens that the class is owed; negative: that it has borrowed."""
        return self._balances[priority]

    def is_within_share(self, priority: Priority) -> bool:
        return self.balance(priority) >= 0.0

    def is_overdue(self, priority: Priority) -> bool:
        """Whether the class is owed so much that nobody else may go first."""
        return self.balance(priority) >= self._burst_tokens

    def pick(self, arrivals: Mapping[Priority, float]) -> Priority:
        """Whose turn it is.

        Args:
            arrivals: when the first request of each class that waits came in, in seconds; one class at least.
        """
        if len(arrivals) == 1:
            return next(iter(arrivals))
        due = [priority for priority in arrivals if self.is_overdue(priority)]
        due = due or [priority for priority in arrivals if self.is_within_share(priority)]
        if due:
            return min(due, key=lambda priority: (arrivals[priority] + self._targets_s[priority], priority))
        return min(arrivals)

    def charge(self, priority: Priority, num_tokens: int, waiting: Container[Priority]) -> None:
        """Books service.

        Args:
            priority: the class that was served.
            num_tokens: how much it got.
            waiting: classes with requests that could have been served instead.
        """
        for each, balance in self._balances.items():
            earned = balance + self._shares[each] * num_tokens
            if each is priority:
                self._balances[each] = max(earned - num_tokens, min(balance, -max(self._burst_tokens, num_tokens)))
            else:
                self._balances[each] = min(earned, self._burst_tokens if each in waiting else 0.0)

    def refund(self, priority: Priority, num_tokens: int, waiting: Container[Priority]) -> None:
        """Takes back a part of a charge for service that was not needed: what the class paid, and what the others
        earned by it. As a class that does not wait had not earned beyond 0, it does not lose below 0 either.

        Args:
            priority: the class that was charged.
            num_tokens: how much of its charges it did not use.
            waiting: as in ``charge``.
        """
        for each, balance in self._balances.items():
            unearned = balance - self._shares[each] * num_tokens
            if each is priority:
                limit = self._burst_tokens if each in waiting else 0.0
                self._balances[each] = max(balance, min(unearned + num_tokens, limit))
            else:
                self._balances[each] = unearned if each in waiting else max(unearned, min(balance, 0.0))
