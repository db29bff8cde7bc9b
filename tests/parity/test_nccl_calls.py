"""NCCL without a GPU: what the communicator calls, when and on which stream, against recording fakes.

Proves call order, arguments, dtype codes, deadlines and the way out. Proves nothing about NCCL itself, whose answers
the fakes make up: test_nccl_library.py, test_nccl_device.py and test_nccl_two_ranks.py do what a machine allows.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from parity.recording_nccl import FakeCuda, FakeNcclError, RecordingNccl

from cluster.distributed.communicator import PeerLost
from cluster.distributed.nccl import NcclCommunicator, new_unique_id
from cluster.distributed.nccl_in_flight import InFlight

REPO = Path(__file__).resolve().parents[2]
DTYPE_CODES = {  # ncclDataType_t
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


class Group:
    """A rank whose module and device are fakes."""

    def __init__(self, *, rank: int = 0, size: int = 2, nccl: RecordingNccl | None = None, **options) -> None:
        self.nccl = nccl or RecordingNccl()
        self.cuda = FakeCuda(released_by=self.nccl.aborted)
        self.communicator = NcclCommunicator(
            new_unique_id(self.nccl),
            rank,
            size,
            torch.device("cuda:0"),
            **{"timeout_s": 30.0} | options,
            nccl=self.nccl,
            cuda=self.cuda,
        )
        self.nccl.calls.clear()
        self.cuda.marks.clear()


@pytest.fixture
def group() -> Iterator[Group]:
    made = Group()
    yield made
    made.communicator.close()


def wait_until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.005)


def test_importing_loads_no_cupy():
    program = "import sys, cluster.distributed.nccl; print('cupy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "False"


class TestBuilding:
    def test_joins_with_the_unique_id_and_counts_the_ranks(self):
        nccl = RecordingNccl()
        cuda = FakeCuda(released_by=nccl.aborted)
        communicator = NcclCommunicator(bytes(range(128)), 1, 3, cuda.device, timeout_s=30, nccl=nccl, cuda=cuda)
        assert (communicator.rank, communicator.size) == (1, 3)
        join, count = nccl.calls
        assert join == ("join", 3, bytes(range(128)), 1)
        assert (count[0], count[3:]) == ("allReduce", (1, DTYPE_CODES[torch.int32], nccl.NCCL_SUM, cuda.current_stream))
        assert cuda.thread == "nccl-1", "the thread that asks events must not break captures"
        communicator.close()

    def test_a_group_that_does_not_come_together(self):
        nccl = RecordingNccl(join_gate=threading.Event())
        with pytest.raises(
            PeerLost, match=r"rank 1 of 2 on cpu of .*waited 0\.1 s for the other ranks to join"
        ) as lost:
            Group(nccl=nccl, rank=1, timeout_s=30, build_timeout_s=0.1)
        assert lost.value.ranks == (0,)
        assert nccl.names() == ["join"]
        nccl.join_gate.set()  # they come after all: what was built then is not left behind
        wait_until(lambda: nccl.names() == ["join", "abort", "destroy"])

    def test_a_refusal_says_why(self):
        with pytest.raises(PeerLost, match="FakeNcclError: NCCL_ERROR_5"):
            Group(nccl=RecordingNccl(join_error=FakeNcclError(5)))
        with pytest.raises(PeerLost, match="status 8"):
            Group(nccl=RecordingNccl(join_error=KeyError(8)))

    def test_a_first_all_reduce_that_does_not_return(self):
        nccl = RecordingNccl()
        nccl.slow["allReduce"] = nccl.aborted
        with pytest.raises(PeerLost, match=r"waited 0\.1 s for the first all-reduce"):
            Group(nccl=nccl, timeout_s=30, build_timeout_s=0.1)
        wait_until(lambda: nccl.names() == ["join", "allReduce", "abort", "destroy"])

    def test_a_first_all_reduce_that_does_not_finish(self):
        nccl = RecordingNccl()
        cuda = FakeCuda(released_by=nccl.aborted, stalled=True)
        with pytest.raises(PeerLost, match="the first all-reduce to finish"):
            NcclCommunicator(bytes(128), 0, 2, cuda.device, timeout_s=0.1, nccl=nccl, cuda=cuda)
        wait_until(lambda: nccl.names() == ["join", "allReduce", "abort", "destroy"])

    def test_a_miscounted_group(self):
        nccl = RecordingNccl(num_peers_counted=3)
        with pytest.raises(PeerLost, match="counted 3 ranks"):
            Group(nccl=nccl)
        wait_until(lambda: nccl.names()[-2:] == ["abort", "destroy"])

    @pytest.mark.parametrize(("unique_id", "rank"), [(bytes(127), 0), (bytes(128), 2), (bytes(128), -1)])
    def test_arguments_are_checked_before_anything_is_joined(self, unique_id, rank):
        nccl = RecordingNccl()
        with pytest.raises(ValueError):
            NcclCommunicator(unique_id, rank, 2, torch.device("cuda:0"), timeout_s=1, nccl=nccl)
        assert not nccl.calls


class TestOperations:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_all_reduce_is_in_place_on_the_current_stream(self, group, dtype):
        x = torch.arange(6, dtype=dtype).view(2, 3)
        group.cuda.current_stream = 11
        group.communicator.all_reduce_(x)
        address = x.data_ptr()
        assert group.nccl.calls == [("allReduce", address, address, 6, DTYPE_CODES[dtype], group.nccl.NCCL_SUM, 11)]
        assert [stream for _, stream in group.cuda.marks] == [11], "the mark lies behind the operation, on its stream"
        assert x.flatten().tolist() == [0, 2, 4, 6, 8, 10]

    @pytest.mark.parametrize("dtype", DTYPE_CODES)
    def test_moved_dtypes_have_their_codes(self, group, dtype):
        x, out = torch.ones(3, 2, dtype=dtype), torch.zeros(2, 3, 2, dtype=dtype)
        group.communicator.all_gather(x, out)
        assert group.nccl.calls == [("allGather", x.data_ptr(), out.data_ptr(), 6, DTYPE_CODES[dtype], 7)]
        assert torch.equal(out, torch.stack([x, x]))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.int16, torch.float64])
    def test_other_dtypes_are_moved_as_bytes(self, group, dtype):
        x = torch.tensor([1, 0, 1]).to(dtype)
        out = torch.zeros(2, 3, dtype=dtype)
        group.communicator.all_gather(x, out)
        ((_, _, _, count, code, _),) = group.nccl.calls
        assert (count, code) == (3 * x.element_size(), DTYPE_CODES[torch.uint8])
        assert torch.equal(out.view(torch.uint8), torch.stack([x, x]).view(torch.uint8))

    def test_all_to_all_is_one_group(self, group):
        x, out = torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.bfloat16)
        group.communicator.all_to_all(x, out)
        code = DTYPE_CODES[torch.bfloat16]
        assert group.nccl.calls == [
            ("groupStart",),
            ("send", x[0].data_ptr(), 5, code, 0, 7),
            ("recv", out[0].data_ptr(), 5, code, 0, 7),
            ("send", x[1].data_ptr(), 5, code, 1, 7),
            ("recv", out[1].data_ptr(), 5, code, 1, 7),
            ("groupEnd",),
        ]
        assert len(group.cuda.marks) == 1

    def test_a_group_is_ended_whatever_happens_in_it(self, group):
        group.nccl.aborted.set()  # so calls fail
        x = torch.zeros(2, 5)
        with pytest.raises(PeerLost, match="an operation failed"):
            group.communicator.all_to_all(x, x.clone())
        assert group.nccl.names()[:3] == ["groupStart", "send", "groupEnd"]

    def test_broadcast_send_and_recv(self, group):
        x = torch.zeros(4, dtype=torch.int64)
        group.communicator.broadcast_(x, 1)
        group.communicator.send(x, 1)
        group.communicator.recv(x, 1)
        assert group.nccl.calls == [
            ("broadcast", x.data_ptr(), x.data_ptr(), 4, 4, 1, 7),
            ("send", x.data_ptr(), 4, 4, 1, 7),
            ("recv", x.data_ptr(), 4, 4, 1, 7),
        ]

    def test_a_barrier_leaves_no_trace_and_can_be_repeated(self, group):
        for _ in range(40):
            group.communicator.barrier()
        assert {call[5] for call in group.nccl.calls} == {group.nccl.NCCL_MAX}

    def test_wrong_tensors_are_refused_before_anything_is_queued(self, group):
        communicator = group.communicator
        square = torch.zeros(2, 2)
        for call in (
            lambda: communicator.all_reduce_(torch.zeros(2, dtype=torch.int64)),
            lambda: communicator.all_reduce_(torch.zeros(2, 3).T),
            lambda: communicator.all_reduce_(torch.zeros(2, device="meta")),
            lambda: communicator.all_gather(square, torch.zeros(2, 4)),
            lambda: communicator.all_gather(square, torch.zeros(2, 2, 2, dtype=torch.float16)),
            lambda: communicator.all_to_all(torch.zeros(3, 2), torch.zeros(3, 2)),
            lambda: communicator.broadcast_(square, 2),
            lambda: communicator.send(square, -1),
            lambda: communicator.recv(square, 2),
            lambda: communicator.recv(square, 0),  # itself
        ):
            with pytest.raises(ValueError):
                call()
        assert not group.nccl.calls
        communicator.check()


class TestBatchInvariance:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_sums_in_the_order_of_the_ranks(self, dtype):
        group = Group(rank=1, size=4, batch_invariant=True)
        generator = torch.Generator().manual_seed(3)
        parts = [torch.randn(257, generator=generator).mul(10.0**rank).to(dtype) for rank in range(4)]
        group.nccl.others = dict(enumerate(parts))
        x = parts[1].clone()
        group.communicator.all_reduce_(x)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        assert group.nccl.names() == ["allGather"]
        assert torch.equal(x, total.to(dtype))
        group.communicator.close()

    def test_another_order_would_show(self):
        group = Group(rank=0, size=3, batch_invariant=True)
        parts = [torch.tensor([1.0]), torch.tensor([1e8]), torch.tensor([-1e8])]
        for order, expected in (((0, 1, 2), 0.0), ((1, 2, 0), 1.0)):
            group.nccl.others = {place: parts[rank] for place, rank in enumerate(order)}
            x = parts[order[0]].clone()
            group.communicator.all_reduce_(x)
            assert x.item() == expected
        group.communicator.close()


class TestCapture:
    def test_recorded_operations_leave_no_mark_and_are_watched_by_check(self, group):
        x = torch.zeros(4)
        group.communicator.check()
        assert not group.cuda.marks, "nothing runs without a call here"
        group.cuda.capturing = True
        group.communicator.all_reduce_(x)
        group.communicator.barrier()
        group.cuda.capturing = False
        assert group.nccl.names() == ["allReduce", "allReduce"]
        assert not group.cuda.marks
        group.communicator.check()  # behind a replay
        assert len(group.cuda.marks) == 1

    def test_a_replay_that_hangs(self):
        group = Group(timeout_s=0.1)
        group.cuda.capturing = True
        group.communicator.all_reduce_(torch.zeros(4))
        group.cuda.capturing, group.cuda.stalled = False, True
        group.communicator.check()
        group.cuda.wait()  # as for a step's results; only an abort lets it return
        with pytest.raises(PeerLost, match="any operation to finish"):
            group.communicator.check()


class TestWatching:
    def test_an_operation_that_does_not_finish(self):
        group = Group(timeout_s=0.1)
        group.cuda.stalled = True
        group.communicator.all_reduce_(torch.zeros(4))
        wait_until(lambda: group.nccl.names() == ["allReduce", "abort", "destroy"])
        for call in (group.communicator.check, lambda: group.communicator.all_reduce_(torch.zeros(4))):
            with pytest.raises(PeerLost, match=r"waited 0\.1 s for any operation to finish") as lost:
                call()
            assert lost.value.ranks == (1,)
        assert group.nccl.names() == ["allReduce", "abort", "destroy"], "nothing is called on what is gone"

    def test_a_barrier_that_nobody_comes_to(self):
        group = Group(timeout_s=0.1)
        group.cuda.stalled = True
        with pytest.raises(PeerLost, match="any operation to finish"):
            group.communicator.barrier()

    def test_a_call_that_waits_for_a_peer(self):
        group = Group(timeout_s=0.1)
        group.nccl.slow["send"] = group.nccl.aborted
        with pytest.raises(PeerLost, match="any operation to finish"):
            group.communicator.send(torch.zeros(4), 1)

    @pytest.mark.parametrize("error", [FakeNcclError(6), KeyError(8)])
    def test_an_asynchronous_error(self, group, error):
        group.nccl.async_error = error
        wait_until(lambda: group.nccl.names() == ["abort", "destroy"])
        with pytest.raises(PeerLost, match="NCCL reports"):
            group.communicator.check()

    def test_in_progress_is_no_error(self, group):
        group.nccl.async_error = KeyError(7)
        time.sleep(0.3)  # several looks
        group.communicator.check()

    def test_a_device_that_fails(self, group):
        group.nccl.async_error = RuntimeError("CUDA error: an illegal memory access")
        wait_until(lambda: group.nccl.names() == ["abort", "destroy"])
        with pytest.raises(PeerLost, match="illegal memory access"):
            group.communicator.check()

    def test_a_failed_call_ends_the_communicator(self, group):
        group.nccl.aborted.set()  # so calls fail
        with pytest.raises(PeerLost, match="an operation failed: FakeNcclError") as lost:
            group.communicator.all_reduce_(torch.zeros(4))
        assert isinstance(lost.value.__cause__, FakeNcclError)
        with pytest.raises(PeerLost, match="an operation failed"):
            group.communicator.check()


class TestInFlight:
    def setup_method(self) -> None:
        self.now = 100.0
        self.cuda = FakeCuda(released_by=threading.Event(), stalled=True)
        self.in_flight = InFlight(self.cuda, lambda: self.now)

    def test_nothing_is_waited_for(self):
        assert self.in_flight.waited_s() == 0

    def test_waiting_counts_from_the_last_that_finished(self):
        for _ in range(3):
            self.in_flight.mark()
            self.now += 1
        assert self.in_flight.waited_s() == 3
        self.cuda.marks[0][0].reached = True
        assert self.in_flight.waited_s() == 0, "there is progress"
        self.now += 5
        assert self.in_flight.waited_s() == 5
        for event, _ in self.cuda.marks:
            event.reached = True
        assert self.in_flight.waited_s() == 0
        self.now += 5
        self.in_flight.mark()
        self.now += 2
        assert self.in_flight.waited_s() == 2, "idle time is not waiting"

    def test_events_are_used_again(self):
        self.cuda.stalled = False
        for _ in range(1000):
            self.in_flight.mark()
            assert self.in_flight.waited_s() == 0
        assert len({id(event) for event, _ in self.cuda.marks}) == 1

    def test_marks_are_bounded_and_the_newest_moves_on(self):
        for _ in range(1000):
            self.in_flight.mark()
        events = {id(event): event for event, _ in self.cuda.marks}
        assert len(events) == 256
        newest = self.cuda.marks[-1][0]
        for event in events.values():
            event.reached = event is not newest
        self.in_flight.waited_s()
        self.now += 4
        assert self.in_flight.waited_s() == 4

    def test_a_call_that_does_not_return(self):
        with self.in_flight.queueing():
            self.now += 3
            assert self.in_flight.waited_s() == 3
        assert self.in_flight.waited_s() == 0


class TestTheWayOut:
    def test_marked_then_aborted_then_destroyed(self, group):
        group.communicator.close()
        assert group.nccl.names() == ["abort", "destroy"]
        for call in (group.communicator.check, group.communicator.barrier):
            with pytest.raises(PeerLost, match="closed"):
                call()
        group.communicator.close()
        group.communicator.abort()
        assert group.nccl.names() == ["abort", "destroy"]

    def test_abort_from_many_threads_is_one_abort(self, group):
        threads = [threading.Thread(target=group.communicator.abort) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pytest.raises(PeerLost, match="aborted"):
            group.communicator.check()
        group.communicator.close()
        assert group.nccl.names() == ["abort", "destroy"]

    def test_abort_lets_a_waiting_operation_go(self, group):
        group.cuda.stalled = True
        threading.Timer(0.1, group.communicator.abort).start()
        with pytest.raises(PeerLost, match="aborted"):
            group.communicator.barrier()

    def test_abort_waits_for_a_call_that_is_about_to_return(self, group):
        group.nccl.slow["send"] = leave = threading.Event()
        caller = threading.Thread(target=group.communicator.send, args=(torch.zeros(4), 1), daemon=True)
        caller.start()
        wait_until(lambda: group.nccl.names() == ["send"])
        group.communicator.abort()
        time.sleep(0.2)  # less than it waits
        assert group.nccl.names() == ["send"], "nobody may be inside when the memory goes"
        leave.set()
        caller.join()
        group.communicator.close()
        assert group.nccl.names() == ["send", "abort", "destroy"]

    def test_close_does_not_wait_for_ever(self, caplog):
        group = Group(nccl=RecordingNccl(abort_gate=threading.Event()))
        group.communicator.close()  # as where graphs hold the communicator
        assert group.nccl.names() == ["abort"]
        assert "do CUDA graphs still hold it?" in caplog.text
        group.nccl.abort_gate.set()
        wait_until(lambda: group.nccl.names() == ["abort", "destroy"])

    @pytest.mark.parametrize("hangs", [False, True])
    def test_an_interpreter_that_forgets_it_ends(self, hangs):
        program = f"""
import sys, threading
sys.path.insert(0, "tests")
from parity.recording_nccl import FakeCuda, RecordingNccl
from cluster.distributed.nccl import NcclCommunicator

class Loud(list):
    def append(self, call):
        print(call[0], flush=True)

nccl = RecordingNccl(calls=Loud(), abort_gate=threading.Event() if {hangs} else None)
cuda = FakeCuda(released_by=nccl.aborted)
communicator = NcclCommunicator(bytes(128), 0, 2, cuda.device, timeout_s=30, nccl=nccl, cuda=cuda)
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=REPO, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["join", "allReduce", "abort", *([] if hangs else ["destroy"])]
