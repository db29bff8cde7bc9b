"""When a class's backlog will have been served, by its share and by what others leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from cluster.core.request import Priority


def drain(
    num_tokens: float,
    priority: Priority,
    backlogs: Mapping[Priority, float],
    *,
    share: Callable[[Priority], float],
    tokens_per_s: float,
) -> tuple[float, dict[Priority, float]]:
    """How ``ClassPolicy`` serves backlogs, as if tokens were a fluid: each class has its share, and the most urgent one
    what is left. Work that comes meanwhile is left out.

    Args:
        num_tokens: of the class ``priority``, that are asked about: the first of its backlog.
        backlogs: tokens that wait, by class.
        share: of a class, in (0, 1].
        tokens_per_s: of all classes together.

    Returns:
        Seconds until they are served, and how much of each class will have been served by then.
    """
    left = {each: float(num) for each, num in backlogs.items() if num > 0 and each is not priority}
    left[priority] = float(num_tokens)
    served = dict.fromkeys(left, 0.0)
    elapsed_s = 0.0
    if tokens_per_s <= 0.0:
        return (math.inf if num_tokens > 0 else 0.0), served
    while left[priority] > 0.0:
        rates = {each: share(each) * tokens_per_s for each in left}
        rates[min(left)] += tokens_per_s - sum(rates.values())
        step_s, first = min((left[each] / rates[each], each) for each in left)
        elapsed_s += step_s
        for each in list(left):
            num_served = left[each] if each is first else min(rates[each] * step_s, left[each])
            served[each] += num_served
            left[each] -= num_served
            if left[each] <= 0.0 and each is not priority:
                del left[each]
    return elapsed_s, served
