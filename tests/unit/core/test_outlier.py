"""A replica that fails is left alone, probed and taken back; never most of them at once."""

from __future__ import annotations

import pytest

from cluster.core.outlier import OutlierDetector
from cluster.core.routing_config import RoutingConfig


def create_detector(**fields: object) -> OutlierDetector:
    defaults = {"eject_after": 3, "ejection_s": 5.0, "max_ejection_s": 18.0}
    return OutlierDetector(RoutingConfig(**defaults | fields))  # type: ignore[arg-type]


def fail(
    detector: OutlierDetector, replica_id: str = "bad", num: int = 3, now: float = 0.0, num_replicas: int = 4
) -> None:
    for _ in range(num):
        detector.record(replica_id, False, now, num_replicas)


def test_some_failures_in_a_row_eject() -> None:
    detector = create_detector()
    fail(detector, num=2)
    detector.record("bad", True, 0.0, 4)
    fail(detector, num=2)
    assert not detector.is_ejected("bad")
    fail(detector, num=1)
    assert detector.is_ejected("bad") and not detector.may_take("bad", 0.0)
    assert not detector.is_ejected("good") and detector.may_take("good", 0.0)


def test_half_of_many_ejects_and_old_ones_do_not_count() -> None:
    detector = create_detector()
    for second in range(0, 400, 40):
        detector.record("bad", second % 80 == 0, float(second), 4)
    assert not detector.is_ejected("bad")
    for index in range(6):
        detector.record("bad", index % 2 == 0, 500.0, 4)
    assert detector.is_ejected("bad")


def test_a_probe_that_succeeds_takes_it_back() -> None:
    detector = create_detector()
    fail(detector)
    assert not detector.may_take("bad", 4.9)
    assert detector.may_take("bad", 5.0)
    detector.sent("bad")
    assert not detector.may_take("bad", 5.1)  # one probe at a time
    detector.record("bad", True, 6.0, 4)
    assert not detector.is_ejected("bad") and detector.may_take("bad", 6.0)


def test_each_probe_that_fails_doubles_the_time_up_to_a_limit() -> None:
    detector, now = create_detector(), 0.0
    fail(detector)
    for duration_s in (5.0, 10.0, 18.0, 18.0):
        assert not detector.may_take("bad", now + duration_s - 0.1)
        now += duration_s
        assert detector.may_take("bad", now)
        detector.sent("bad")
        detector.record("bad", False, now, 4)
    detector.sent("bad")
    detector.record("bad", True, now, 4)
    fail(detector, now=now)
    assert detector.may_take("bad", now + 5.0)  # it begins anew


def test_what_was_sent_before_the_ejection_is_no_probe() -> None:
    detector = create_detector()
    fail(detector)
    detector.record("bad", True, 1.0, 4)
    assert detector.is_ejected("bad")
    detector.record("bad", False, 1.0, 4)
    assert detector.may_take("bad", 5.0)


def test_a_probe_that_says_nothing_makes_way_for_another() -> None:
    detector = create_detector()
    fail(detector)
    detector.sent("bad")
    detector.unsent("bad")
    assert detector.is_ejected("bad") and detector.may_take("bad", 5.0)


@pytest.mark.parametrize(("num_replicas", "num_ejected"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_at_most_half_are_ejected(num_replicas: int, num_ejected: int) -> None:
    detector = create_detector()
    names = [f"r{index}" for index in range(num_replicas)]
    for name in names:
        fail(detector, name, num=20, num_replicas=num_replicas)
    assert sum(detector.is_ejected(name) for name in names) == num_ejected


def test_one_that_comes_back_under_its_name_is_another() -> None:
    detector = create_detector()
    fail(detector)
    detector.forget("bad")
    assert not detector.is_ejected("bad")


def test_it_can_be_turned_off() -> None:
    detector = create_detector(eject_after=0)
    fail(detector, num=100)
    assert not detector.is_ejected("bad")
