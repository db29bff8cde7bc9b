"""Which of a model's replicas takes a request: who may at all, and whom the policy chooses among them."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

from cluster.core.outlier import OutlierDetector
from cluster.core.routing import Placement, ReplicaSnapshot, create_policy
from cluster.core.routing_config import RoutingConfig

_LEAST_WEIGHT = 0.1


class Router:
    """Routes the requests for one model. Pure: ``now`` is in monotonic seconds.

    Only replicas that are ready take work, and of the same weights where work goes on that another began. Ejected ones
    do where there is no other, or to be probed. Of what is left, equal fingerprints go first.

    Attributes:
        outliers: hears of outcomes.

    Args:
        rng: for ties.
    """

    def __init__(self, config: RoutingConfig, rng: random.Random) -> None:
        self.outliers = OutlierDetector(config)
        self._slow_start_s = config.slow_start_s
        self._policy = create_policy(config.policy, rng)

    def pick(
        self,
        placement: Placement,
        replicas: Collection[ReplicaSnapshot],
        *,
        now: float,
        only_digest: str | None = None,
        prefer: str | None = None,
    ) -> str | None:
        """The chosen replica's id, or None where nobody can take it.

        Args:
            only_digest: other models than this are out of the question.
            prefer: the fingerprint that goes first.
        """
        able = [each for each in replicas if each.ready and only_digest in (None, each.model_digest)]
        able = [each for each in able if self.outliers.may_take(each.replica_id, now)] or able
        if prefer is not None:
            able = [each for each in able if each.fingerprint == prefer] or able
        if not able:
            return None
        self._weigh(able)
        chosen = self._probe(able) or self._policy.pick(placement, _comparable(able))
        self.outliers.sent(chosen.replica_id)
        return chosen.replica_id

    def predict_ttft_s(self, placement: Placement, replicas: Collection[ReplicaSnapshot]) -> float | None:
        """Until the first token of a request that would be sent now; None where nobody is ready or has measured."""
        able = _comparable([each for each in replicas if each.ready and not self.outliers.is_ejected(each.replica_id)])
        return min((each.ttft_s(placement.num_prompt_tokens) for each in able if each.is_measured), default=None)

    def weight(self, ready_s: float, longest_ready_s: float) -> float:
        """How much of the work a replica should get that has been ready for so long, in (0, 1].

        Args:
            longest_ready_s: of the one that has been ready for longest: where all are fresh none is spared.
        """
        return self._ramp(ready_s) / self._ramp(longest_ready_s)

    def _ramp(self, ready_s: float) -> float:
        if ready_s >= self._slow_start_s:
            return 1.0
        # In tenths, so that those that came at the same time are alike.
        return max(_LEAST_WEIGHT, int(10 * ready_s / self._slow_start_s) / 10)

    def _weigh(self, replicas: Sequence[ReplicaSnapshot]) -> None:
        longest_s = max(each.ready_s for each in replicas)
        for each in replicas:
            each.weight = self.weight(each.ready_s, longest_s)

    def _probe(self, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot | None:
        """The replica that is due for one."""
        if all(self.outliers.is_ejected(each.replica_id) for each in replicas):
            return None
        return next((each for each in replicas if self.outliers.is_ejected(each.replica_id)), None)


def _comparable(replicas: Sequence[ReplicaSnapshot]) -> Sequence[ReplicaSnapshot]:
    """With the mean speed of their likes, for those that have likes: equal fingerprints mean equal devices, and what
    sets their speeds apart is noise or the work that they have. One that was slow for a moment and had no work since
    would not get any again. Those that have not measured theirs get the mean of all others.
    """
    measured = [each for each in replicas if each.is_measured]
    if not measured:
        return replicas
    means = {"": _mean_speed(measured)}
    for name in {each.fingerprint for each in measured if each.fingerprint}:
        means[name] = _mean_speed([each for each in measured if each.fingerprint == name])
    for each in replicas:
        if each.fingerprint or not each.is_measured:
            each.step_s, each.prompt_token_s = means.get(each.fingerprint, means[""])
    return replicas


def _mean_speed(measured: Sequence[ReplicaSnapshot]) -> tuple[float, float]:
    """Seconds of a step, and of a token of a prompt."""
    return (
        sum(each.step_s for each in measured) / len(measured),
        sum(each.prompt_token_s for each in measured) / len(measured),
    )
