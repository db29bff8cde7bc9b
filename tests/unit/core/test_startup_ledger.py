import pytest

from cluster.core.startup_ledger import Stage, StartupLedger


def create_ledger(num_ranks: int = 2, timeout_s: float = 10.0) -> StartupLedger:
    return StartupLedger(num_ranks, timeout_s, now=100.0)


def reach_all(ledger: StartupLedger, stage: Stage, now: float) -> None:
    for rank in range(2):
        ledger.reach(rank, stage, now)


def test_ranks_may_come_in_any_order():
    ledger = create_ledger(num_ranks=3)
    for rank, now in ((2, 101.0), (0, 102.0), (1, 109.0)):
        assert not ledger.is_complete
        ledger.place(rank, f"node-{rank}", now)
    assert ledger.is_complete
    assert ledger.lateness(1e9) is None
    assert [ledger.node(rank) for rank in range(3)] == ["node-0", "node-1", "node-2"]


def test_a_rank_is_late_at_the_deadline_and_not_before():
    ledger = create_ledger()
    ledger.place(0, "node-a", 101.0)
    assert ledger.lateness(109.9) is None
    late = ledger.lateness(110.0)
    assert "rank 1 on a node not known yet: not connected" in late
    assert "within 10 s (1 of 2 ranks have)" in late
    assert "rank 0" not in late
    assert "parallel.start_timeout_s" in late


def test_every_stage_has_a_deadline_of_its_own():
    ledger = create_ledger()
    ledger.place(0, "node-a", 109.0)
    ledger.place(1, "node-b", 109.0)
    ledger.begin(Stage.JOINED, 109.5)
    assert ledger.deadline == 119.5
    reach_all(ledger, Stage.JOINED, 112.0)
    ledger.begin(Stage.LOADED, 112.0)
    ledger.reach(0, Stage.LOADED, 113.0)
    assert ledger.missing == (1,)
    assert ledger.lateness(121.9) is None
    assert "rank 1 on node-b: not loaded their part of the model" in ledger.lateness(122.0)


def test_all_late_ranks_are_named():
    late = create_ledger(num_ranks=3).lateness(200.0)
    assert all(f"rank {rank} " in late for rank in range(3))


def test_what_comes_out_of_turn_is_refused():
    ledger = create_ledger()
    ledger.place(0, "node-a", 101.0)
    for rank, stage, why in (
        (0, Stage.PLACED, "rank 0 has said PLACED before"),
        (2, Stage.PLACED, "no rank 2"),
        (-1, Stage.PLACED, "no rank -1"),
        (1, Stage.LOADED, "rank 1 says LOADED while"),
    ):
        with pytest.raises(ValueError, match=why):
            ledger.reach(rank, stage, 102.0)
    with pytest.raises(ValueError, match=r"JOINED cannot begin: ranks \(1,\)"):
        ledger.begin(Stage.JOINED, 102.0)
    ledger.place(1, "node-b", 102.0)
    with pytest.raises(ValueError, match="LOADED cannot begin"):
        ledger.begin(Stage.LOADED, 103.0)


def test_the_summary_names_the_slowest():
    ledger = create_ledger()
    ledger.place(0, "node-a", 101.0)
    ledger.place(1, "node-b", 103.0)
    ledger.begin(Stage.JOINED, 104.0)
    ledger.reach(1, Stage.JOINED, 104.5)
    ledger.reach(0, Stage.JOINED, 104.6)
    assert ledger.summary() == "placed 3.0 s (rank 1), joined 0.6 s (rank 0)"
