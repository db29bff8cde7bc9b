"""What the communicator over shared memory promises beyond what every one does."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from communicator_group import Group, Raised, ShmMeeting, lost_ranks

from cluster.distributed.communicator import Communicator, PeerLost
from cluster.distributed.shm import ShmCommunicator, segment_path
from cluster.errors import ConfigError
from cluster.kernels.cpu import collective
from cluster.kernels.cpu.library import library
from cluster.kernels.cpu.program import Arena, Program, record

pytestmark = pytest.mark.skipif(not ShmCommunicator.available(), reason="no shared memory, or no compiled kernels")

SHORT_S = 1.5
SLACK_S = 4.0

recorded: Program | None = None  # of this rank's process


@pytest.fixture
def create_group() -> Iterator:
    made: list[Group] = []

    def create(size: int, **kwargs) -> Group:
        made.append(Group(ShmMeeting(), size, **kwargs))
        return made[-1]

    yield create
    for group in made:
        group.close()


class SameRankMeeting(ShmMeeting):
    def join(self, rank: int, size: int, timeout_s: float) -> ShmCommunicator:
        return super().join(0, size, timeout_s)


# --- tasks ---


def record_step(comm: Communicator) -> None:
    global recorded
    x, wide, theirs = torch.zeros(100), torch.zeros(comm.size, 100), torch.zeros(comm.size, 100)
    passed = torch.zeros(50)

    def step() -> tuple[torch.Tensor, ...]:
        comm.all_reduce_(x)
        comm.all_gather(x, wide)
        comm.all_to_all(wide, theirs)
        comm.broadcast_(theirs, 1)
        comm.barrier()
        if comm.rank == 0:
            comm.send(x[:50], 1)
        elif comm.rank == 1:
            comm.recv(passed, 0)
        return x, wide, theirs, passed

    recorded = record(library(), Arena(2**16), step)


def run_recorded(comm: Communicator, number: float) -> list[float]:
    x, _, _, passed = recorded.result
    x.fill_(number + comm.rank)
    results = [float(part.sum()) for part in recorded.run()]
    comm.check()
    assert comm.rank != 1 or torch.equal(passed, x[:50])
    return results[:3]


def run_recorded_in_vain(comm: Communicator) -> tuple[float, float, bool]:
    """Seconds of a run without the others and of one more; whether both went by without an exception that check has."""
    times = []
    for _ in range(2):
        start = time.monotonic()
        recorded.run()
        times.append(time.monotonic() - start)
    try:
        comm.check()
    except PeerLost:
        return *times, True
    return *times, False


def run_closed(comm: Communicator) -> None:
    comm.close()
    recorded.run()


def sum_of(comm: Communicator, count: int) -> None:
    comm.all_reduce_(torch.ones(count))


def send_to(comm: Communicator, peer: int, counts: list[int]) -> float:
    start = time.monotonic()
    for count in counts:
        comm.send(torch.ones(count), peer)
    return time.monotonic() - start


def recv_from(comm: Communicator, peer: int, count: int) -> None:
    comm.recv(torch.zeros(count), peer)


def gather_of(comm: Communicator, count: int) -> None:
    comm.all_gather(torch.ones(count), torch.ones(comm.size, count))


def sums_by_instruction_set(comm: Communicator) -> dict[str, bytes]:
    """Of halves and floats of odd counts, as each instruction set of this machine makes them."""
    results = {}
    for isa in library().available():
        function = library().with_isa(isa).function("all_reduce", *collective.functions().all_reduce.argtypes)
        sums = b""
        for dtype, number in collective.FLOAT_TYPES.items():
            for count in (1, 33, 40_007):
                x = torch.randn(count, generator=torch.Generator().manual_seed(comm.rank)).to(dtype)
                function(comm._address, x.data_ptr(), count, number)
                comm.check()
                sums += x.view(torch.uint8).numpy().tobytes()
        results[isa] = sums
    return results


# --- programs ---


def test_a_recorded_step_runs_again_with_other_numbers(create_group):
    group = create_group(2)
    group.run(record_step)
    for number in (1.0, 5.0):
        total = 100 * (2 * number + 1)
        assert group.run(run_recorded, number) == [[total, 2 * total, 2 * total]] * 2


def test_a_recorded_step_without_its_peers_returns_and_check_raises(create_group):
    group = create_group(3, timeout_s=SHORT_S)
    group.run(record_step)
    group.start(run_recorded_in_vain, ranks=[0, 1])
    for first_s, second_s, raised in group.results([0, 1]).values():
        assert first_s < SHORT_S + SLACK_S
        assert second_s < SHORT_S
        assert raised


def test_a_recorded_step_of_a_closed_communicator_does_nothing(create_group):
    group = create_group(2)
    group.run(record_step)
    group.run(run_closed)


def test_all_instruction_sets_sum_alike(create_group):
    for results in create_group(3).run(sums_by_instruction_set):
        assert len(set(results.values())) == 1


# --- what ranks do wrong ---


@pytest.mark.parametrize(("task", "count"), [(sum_of, 101), (gather_of, 100)], ids=["size", "operation"])
def test_ranks_that_call_different_things_are_told(create_group, task, count):
    group = create_group(2)
    group.start(sum_of, 100, ranks=[0])
    group.start(task, count, ranks=[1])
    for result in group.results().values():
        assert isinstance(result.error, PeerLost)
        assert "another operation, or with other sizes" in str(result.error)


def test_a_message_of_another_size_is_told(create_group):
    group = create_group(2)
    group.start(send_to, 1, [100], ranks=[0])
    group.start(recv_from, 0, 99, ranks=[1])
    results = group.results()
    assert isinstance(results[1], Raised)
    assert lost_ranks(results[1]) == (0,)


def test_a_rank_that_joins_twice_is_told():
    group = Group(SameRankMeeting(), 2)
    try:
        assert all("joined twice" in str(result.error) for result in group.joined.values())
    finally:
        group.close()


# --- messages ---


def test_a_sender_does_not_wait_for_what_fits_the_buffer(create_group):
    group = create_group(2, timeout_s=SHORT_S)
    group.start(send_to, 1, [10_000] * 10, ranks=[0])
    assert not isinstance(group.results([0])[0], Raised)
    for _ in range(10):
        group.start(recv_from, 0, 10_000, ranks=[1])
        assert group.results([1]) == {1: None}


# --- the file ---


def test_the_file_is_for_its_user_alone_and_gone_when_all_have_joined():
    meeting = ShmMeeting()
    group = Group(meeting, 2, delays_s=[0.0, 1.0], wait=False)
    try:
        while not os.path.exists(meeting.path):
            time.sleep(0.01)
        assert os.stat(meeting.path).st_mode & 0o777 == 0o600
        assert group.results() == {0: None, 1: None}
        assert not os.path.exists(meeting.path)
    finally:
        group.close()


def test_those_who_give_up_leave_no_file():
    path = segment_path()
    with pytest.raises(PeerLost, match="rank 1 did not come"):
        ShmCommunicator(path, 0, 2, timeout_s=0.2)
    assert not os.path.exists(path)


def test_what_the_killed_left_is_removed_by_the_next_group():
    meeting = ShmMeeting()
    group = Group(meeting, 2, delays_s=[0.0, None], wait=False)
    while not os.path.exists(meeting.path):
        time.sleep(0.01)
    time.sleep(0.1)
    ShmCommunicator(segment_path(), 0, 1, timeout_s=SHORT_S).close()
    assert os.path.exists(meeting.path), "somebody waits there"
    group.signal(0, signal.SIGKILL)
    group.close()
    assert os.path.exists(meeting.path), "nobody was left to remove it"
    ShmCommunicator(segment_path(), 0, 1, timeout_s=SHORT_S).close()
    assert not os.path.exists(meeting.path)


@pytest.mark.parametrize("mode", [0o640, 0o602])
def test_a_file_that_others_may_touch_is_refused_and_kept(tmp_path, mode):
    path = tmp_path / "segment"
    path.touch()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="not a file of this user alone"):
        ShmCommunicator(str(path), 0, 1, timeout_s=SHORT_S)
    assert path.exists()


def test_a_file_of_another_size_is_refused_and_kept(tmp_path):
    path = tmp_path / "segment"
    path.write_bytes(b"something else")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="has 14 bytes where"):
        ShmCommunicator(str(path), 0, 1, timeout_s=SHORT_S)
    assert path.read_bytes() == b"something else"


def test_a_segment_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "segment"
    path.write_bytes(b"\0" * 64 + b"strange!" + b"\0" * (collective.segment_bytes(1) - 72))
    path.chmod(0o600)
    with pytest.raises(PeerLost, match="another version or number of ranks"):
        ShmCommunicator(str(path), 0, 1, timeout_s=SHORT_S)


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "target").touch(0o600)
    (tmp_path / "segment").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"):
        ShmCommunicator(str(tmp_path / "segment"), 0, 1, timeout_s=SHORT_S)


def test_too_many_ranks_are_refused():
    with pytest.raises(ConfigError, match="1 to 32 ranks, not 33"):
        ShmCommunicator(segment_path(), 0, 33, timeout_s=SHORT_S)
