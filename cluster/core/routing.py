"""Which replica takes a request: pure policies over snapshots."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.core.request import Priority
from cluster.core.routing_config import PolicyName

_NEAR = 0.01  # costs this close, as a share of the least, say nothing; nor do those within half a step
# What is computed though another replica has it delays all who come after. Of the hits that one cache for all replicas
# would have had, conversations got 62 % with a weight of 1 where there was as much work as could be done, 84 % with 4,
# 93 % with 8 and 96 % with 16, which keeps some waiting for too long.
_COMPUTING_WEIGHT = 10.0
_STEP_TOKENS = 64  # a step without prompts takes about as long as this many tokens of one, where nothing was measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What the choice of a replica depends on, of one request.

    Attributes:
        num_prompt_tokens: at least 1; of work that goes on after another replica, with the tokens that it has.
        max_tokens: that may still come.
        priority: class.
        block_hashes: of the prompt's full blocks (``core.prefix_index.block_name``); empty: not known.
        session_id: requests of one session go to one replica under that policy; empty: of no session.
    """

    num_prompt_tokens: int
    max_tokens: int
    priority: Priority = Priority.P1
    block_hashes: Sequence[int] = ()
    session_id: str = ""


@dataclass(kw_only=True, slots=True)
class ReplicaSnapshot:
    """A replica as the caller sees it now, for one request.

    Attributes:
        replica_id: its name.
        ready: connected and not draining.
        outstanding_tokens: prompt and completion tokens that the caller sent it and that are not done.
        group: zone, rack or accelerator class; empty: of none.
        model_digest: of its weights.
        fingerprint: equal for replicas that generate the same tokens.
        ready_s: for how long it has been, in seconds.
        weight: how much of the work it should get beside others, in (0, 1].
        num_replicas: that it stands for.
        backlog_tokens: prompt tokens that it would compute before those of the request.
        cached_tokens: of the request's prompt, expected in its prefix cache.
        step_s: what one of its steps takes without prompts; 0: not known.
        prompt_token_s: what each token of a prompt adds to a step; 0: not known.
        max_num_batched_tokens: in one of its steps; 0: not known.
    """

    replica_id: str
    ready: bool
    outstanding_tokens: int
    group: str = ""
    model_digest: str = ""
    fingerprint: str = ""
    ready_s: float = math.inf
    weight: float = 1.0
    num_replicas: int = 1
    backlog_tokens: int = 0
    cached_tokens: int = 0
    step_s: float = 0.0
    prompt_token_s: float = 0.0
    max_num_batched_tokens: int = 0

    @property
    def is_measured(self) -> bool:
        return self.step_s > 0.0 and self.prompt_token_s > 0.0

    def uncached_tokens(self, num_prompt_tokens: int) -> int:
        """That it would compute of a prompt; one at least."""
        return max(num_prompt_tokens - self.cached_tokens, 1)

    def ttft_s(self, num_prompt_tokens: int) -> float:
        """Predicted time to the first token of a prompt: its tokens that are not cached, behind the backlog.

        Where nothing was measured, in units of the time that a token of a prompt takes.
        """
        return self._seconds(self.backlog_tokens + self.uncached_tokens(num_prompt_tokens))

    def cost_s(self, num_prompt_tokens: int) -> float:
        """What it takes to have a prompt there: the time to its first token, and the time that others lose by it. The
        backlog of one that should get less of the work counts as so much longer; where nothing waits, all are alike.
        """
        uncached_tokens = self.uncached_tokens(num_prompt_tokens)
        lost_s = (_COMPUTING_WEIGHT - 1.0) * uncached_tokens * self._speed[1]
        return self._seconds(self.backlog_tokens / self.weight + uncached_tokens) + lost_s

    def is_near(self, cost_s: float, least_s: float) -> bool:
        """Whether a cost differs from the least one by no more than what may be chance."""
        return cost_s <= least_s * (1 + _NEAR) + self._speed[0] / 2

    def _seconds(self, num_tokens: float) -> float:
        """Until so many tokens of prompts are computed."""
        num_steps = math.ceil(num_tokens / self.max_num_batched_tokens) if self.max_num_batched_tokens else 1
        step_s, prompt_token_s = self._speed
        return num_tokens * prompt_token_s + num_steps * step_s

    @property
    def _speed(self) -> tuple[float, float]:
        """Seconds of a step, and of a token of a prompt."""
        return (self.step_s, self.prompt_token_s) if self.is_measured else (float(_STEP_TOKENS), 1.0)


class RoutingPolicy(Protocol):
    """Chooses among replicas that could all take the request."""

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        """One of ``replicas``, of which there is one at least."""


class RoundRobin:
    """Each in its turn, by weight: stride scheduling (Waldspurger and Weihl, 1995)."""

    def __init__(self) -> None:
        self._turns: dict[str, float] = {}
        self._now = 0.0

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        # Who was not there for a while has no turns to catch up on.
        chosen = min(
            replicas, key=lambda each: (max(self._turns.get(each.replica_id, 0.0), self._now), each.replica_id)
        )
        self._now = max(self._turns.get(chosen.replica_id, 0.0), self._now)
        self._turns[chosen.replica_id] = self._now + 1.0 / (chosen.weight * chosen.num_replicas)
        self._turns = {name: turn for name, turn in self._turns.items() if turn > self._now}
        return chosen


class LeastTokens:
    """The least outstanding tokens, by weight; a tie is drawn.

    Args:
        rng: source of randomness, so that gateways which start together do not pick alike.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        own = placement.num_prompt_tokens + placement.max_tokens
        loads = [(each.outstanding_tokens + own) / each.weight for each in replicas]
        least = min(loads)
        return self._rng.choice([each for each, load in zip(replicas, loads, strict=True) if load == least])


class PrefixAffinity:
    """The least predicted time to first token, where computing again what is cached elsewhere weighs more than waiting.

    So a prompt goes where its prefix is cached until the backlog there is some times longer than what computing it
    again takes: affinity falls away on imbalance by itself, and what is popular comes to be cached in several places.
    Among replicas that cost nearly the same the one with the least outstanding tokens takes it.

    Args:
        rng: source of randomness, for ties.
    """

    def __init__(self, rng: random.Random) -> None:
        self._least_tokens = LeastTokens(rng)

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        costs_s = [each.cost_s(placement.num_prompt_tokens) for each in replicas]
        least_s = min(costs_s)
        return self._least_tokens.pick(
            placement, [each for each, cost_s in zip(replicas, costs_s, strict=True) if each.is_near(cost_s, least_s)]
        )


class Session:
    """Requests of one session on one replica, as long as it is there; the others as another policy says.

    Rendezvous hashing (Thaler and Ravishankar, 1998), weighted by numbers of replicas: when one goes only its own
    sessions move, and all gateways send a session to the same one without talking to each other.

    Args:
        otherwise: for requests of no session.
    """

    def __init__(self, otherwise: RoutingPolicy) -> None:
        self._otherwise = otherwise

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        if not placement.session_id:
            return self._otherwise.pick(placement, replicas)
        return max(
            replicas, key=lambda each: each.num_replicas / -math.log(_draw(placement.session_id, each.replica_id))
        )


class GroupFirst:
    """A group, then a replica in it.

    A group stands there as one replica with the mean of its members' work, and with the backlog and the cache of the
    one where the request costs least. So groups share the work by their sizes, and one that has lost members gets
    less of it.

    Args:
        create: makes the policy for the choice of a group, and one for each group.
    """

    def __init__(self, create: Callable[[], RoutingPolicy]) -> None:
        self._create = create
        self._among_groups = create()
        self._among_replicas: dict[str, RoutingPolicy] = {}

    def pick(self, placement: Placement, replicas: Sequence[ReplicaSnapshot]) -> ReplicaSnapshot:
        groups: dict[str, list[ReplicaSnapshot]] = {}
        for replica in replicas:
            groups.setdefault(replica.group, []).append(replica)
        name = next(iter(groups))
        if len(groups) > 1:
            stand_ins = [_stand_in(members, placement.num_prompt_tokens) for members in groups.values()]
            name = self._among_groups.pick(placement, stand_ins).group
        if name not in self._among_replicas:
            self._among_replicas[name] = self._create()
        return self._among_replicas[name].pick(placement, groups[name])


def _stand_in(members: Sequence[ReplicaSnapshot], num_prompt_tokens: int) -> ReplicaSnapshot:
    soonest = min(members, key=lambda each: each.cost_s(num_prompt_tokens))
    return dataclasses.replace(
        soonest,
        replica_id=soonest.group,
        outstanding_tokens=sum(each.outstanding_tokens for each in members) // len(members),
        weight=sum(each.weight for each in members) / len(members),
        num_replicas=len(members),
    )


def create_policy(name: PolicyName, rng: random.Random) -> RoutingPolicy:
    """The policy of that name. It looks at groups first."""

    def create() -> RoutingPolicy:
        match name:
            case "round_robin":
                return RoundRobin()
            case "least_tokens":
                return LeastTokens(rng)
            case "prefix_affinity":
                return PrefixAffinity(rng)
            case "session":
                return Session(PrefixAffinity(rng))

    return GroupFirst(create)


def _draw(session_id: str, replica_id: str) -> float:
    """In (0, 1), the same everywhere."""
    digest = hashlib.blake2b(f"{len(session_id)}/{session_id}/{replica_id}".encode(), digest_size=7).digest()
    return (int.from_bytes(digest, "big") + 0.5) / 2**56
