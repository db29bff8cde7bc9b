"""What every communicator promises, on every one that this machine has; see ``communicator.py``.

Ranks are processes. Sums are compared bit by bit with numpy's in the order of the ranks, on numbers of which other
orders give other sums.
"""

from __future__ import annotations

import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from communicator_group import GlooMeeting, Group, Raised, ShmMeeting, lost_ranks
from nccl_meeting import NcclMeeting
from torch import Tensor

from cluster.distributed.communicator import Communicator, PeerLost
from cluster.distributed.nccl import NcclCommunicator
from cluster.distributed.shm import ShmCommunicator

MEETINGS = {"shm": ShmMeeting, "gloo": GlooMeeting, "nccl": NcclMeeting}
AVAILABLE = [
    *(["shm"] if ShmCommunicator.available() else []),
    "gloo",
    *([pytest.param("nccl", marks=pytest.mark.gpu)] if NcclCommunicator.available() else []),
]

SHORT_S = 1.5  # deadline where one is to pass
SLACK_S = 4.0  # what a failure may take beyond the deadline on a busy machine
OPERATIONS = ["all_reduce", "all_gather", "all_to_all", "broadcast", "barrier", "recv", "send"]
COUNTS = [1, 2, 3, 17, 1000, 4097, 2**14 + 1, 2**16, 2**18 + 33, 2**21]


@pytest.fixture(params=AVAILABLE)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[tuple[str, int], Group]]:
    made: dict[tuple[str, int], Group] = {}
    yield made
    for group in made.values():
        group.close()


@pytest.fixture(params=[2, 3, 4])
def group(request, backend, groups) -> Group:
    """A group that lives as long as the module: for tests that leave it sound."""
    key = backend, request.param
    if key not in groups:
        groups[key] = Group(MEETINGS[backend](), request.param)
    return groups[key]


@pytest.fixture
def create_group(backend) -> Iterator:
    """Groups that may break."""
    if backend == "nccl":
        pytest.skip("NCCL cannot name the rank that it waits for; its failures are in test_nccl_two_ranks.py")
    made: list[Group] = []

    def create(size: int, **kwargs) -> Group:
        made.append(Group(MEETINGS[backend](), size, **kwargs))
        return made[-1]

    yield create
    for group in made:
        group.close()


def numbers(seed: int, *shape: int) -> Tensor:
    """float32 of very different sizes, so that the order of additions shows."""
    rng, count = np.random.default_rng(seed), math.prod(shape)
    drawn = rng.standard_normal(min(count, 65_521)) * 10.0 ** rng.uniform(-3, 3, min(count, 65_521))
    return torch.from_numpy(np.resize(drawn, count).astype(np.float32)).view(shape)


def ordered_sum(terms: list[Tensor]) -> Tensor:
    """In float32, rounded once."""
    total = terms[0].view(-1).float().numpy()
    for term in terms[1:]:
        total = total + term.view(-1).float().numpy()
    return torch.from_numpy(total).to(terms[0].dtype).view(terms[0].shape)


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def of_dtype(dtype: torch.dtype, seed: int, *shape: int) -> Tensor:
    """Random bytes, which repeat at a distance that no buffer has."""
    count = math.prod(shape) * dtype.itemsize
    drawn = np.random.default_rng(seed).integers(0, 256, min(count, 65_521), dtype=np.uint8)
    filled = torch.from_numpy(np.resize(drawn, count)).view(*shape, dtype.itemsize)
    return (filled[..., 0] % 2 == 0) if dtype is torch.bool else filled.view(dtype).view(shape)


# --- tasks: they run on the ranks, assert there, and give something to compare ---


def sum_counts(comm: Communicator, dtype: torch.dtype, counts: list[int]) -> list[bytes]:
    results = []
    for count in counts:
        terms = [numbers(count * 100 + rank, count).to(dtype) for rank in range(comm.size)]
        x = terms[comm.rank].clone()
        comm.all_reduce_(x)
        assert bits(x) == bits(ordered_sum(terms)), f"{count} of {dtype}"
        results.append(bits(x)[:64])
    return results


def sum_shape(comm: Communicator, shape: tuple[int, ...]) -> None:
    terms = [numbers(rank, *shape) for rank in range(comm.size)]
    x = terms[comm.rank].clone()
    comm.all_reduce_(x)
    assert x.shape == shape
    assert bits(x) == bits(ordered_sum(terms))


def sum_specials(comm: Communicator, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), largest, -largest, torch.finfo(dtype).tiny / 4, 1.0]
    mine = torch.tensor([values[(i + comm.rank * i // 9) % 9] for i in range(81)], dtype=dtype)
    terms = torch.empty(comm.size, 81, dtype=dtype)
    comm.all_gather(mine, terms)
    comm.all_reduce_(mine)
    expected = ordered_sum(list(terms))
    assert torch.equal(mine.isnan(), expected.isnan())
    assert bits(mine[~mine.isnan()]) == bits(expected[~expected.isnan()])


def gather(comm: Communicator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out = of_dtype(dtype, 99, comm.size, *shape)
    comm.all_gather(of_dtype(dtype, comm.rank, *shape), out)
    for rank in range(comm.size):
        assert bits(out[rank]) == bits(of_dtype(dtype, rank, *shape)), f"part {rank}, {dtype} {shape}"


def exchange(comm: Communicator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    out = of_dtype(dtype, 99, comm.size, *shape)
    comm.all_to_all(of_dtype(dtype, comm.rank, comm.size, *shape), out)
    for rank in range(comm.size):
        assert bits(out[rank]) == bits(of_dtype(dtype, rank, comm.size, *shape)[comm.rank]), f"part {rank}, {dtype}"


def broadcast(comm: Communicator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for root in range(comm.size):
        x = of_dtype(dtype, comm.rank, *shape)
        comm.broadcast_(x, root)
        assert bits(x) == bits(of_dtype(dtype, root, *shape)), f"root {root}, {dtype} {shape}"


def pass_on(comm: Communicator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """From the first rank through all to the last and, with that one's mark, to the first."""
    x = of_dtype(dtype, 0, *shape)
    if comm.rank > 0:
        x = of_dtype(dtype, 99, *shape)
        comm.recv(x, comm.rank - 1)
    if comm.rank < comm.size - 1:
        comm.send(x, comm.rank + 1)
    assert bits(x) == bits(of_dtype(dtype, 0, *shape)), f"{dtype} {shape}"
    if comm.rank == comm.size - 1:
        kept = bits(x)
        comm.send(x, 0)
        x.zero_()  # free on return: what was sent is not changed by it
        assert kept == bits(of_dtype(dtype, 0, *shape))
    if comm.rank == 0:
        comm.recv(x, comm.size - 1)
        assert bits(x) == bits(of_dtype(dtype, 0, *shape))


def many_messages(comm: Communicator, count: int) -> None:
    """Of many sizes, in their order, while the receiver is slow at first."""
    rng = random.Random(5)
    for number in range(count):
        size = rng.choice([1, 5, 300, 4096, 70_001])
        if comm.rank == 0:
            for peer in range(1, comm.size):
                comm.send(of_dtype(torch.uint8, number, size), peer)
        else:
            time.sleep(0.01 if number < 5 else 0.0)
            out = torch.zeros(size, dtype=torch.uint8)
            comm.recv(out, 0)
            assert bits(out) == bits(of_dtype(torch.uint8, number, size)), f"message {number}"


def for_each(comm: Communicator, task: Callable[..., object], arguments: list[tuple]) -> None:
    for given in arguments:
        task(comm, *given)


def interleave(comm: Communicator, seed: int) -> int:
    """Operations in a random order, the same on all ranks; pauses that are not."""
    same, own = random.Random(seed), random.Random(seed * 10 + comm.rank)
    shapes = [(1,), (3, 5), (257,), (64, 64), (3_333,), (100_001,)]
    done = 0
    for number in range(40):
        shape = same.choice(shapes)
        operation = same.choice(["sum", "gather", "exchange", "broadcast", "pass", "barrier"])
        if own.random() < 0.2:
            time.sleep(own.random() * 0.005)
        match operation:
            case "sum":
                sum_shape(comm, shape)
            case "gather":
                gather(comm, torch.int64, shape)
            case "exchange":
                exchange(comm, torch.float32, shape)
            case "broadcast":
                broadcast(comm, torch.int32, shape)
            case "pass":
                pass_on(comm, torch.bfloat16, shape)
            case "barrier":
                comm.barrier()
        done += number
    comm.check()
    return done


def repeat_sum(comm: Communicator, count: int, times: int) -> list[bytes]:
    results = set()
    for _ in range(times):
        x = numbers(comm.rank, count)
        comm.all_reduce_(x)
        results.add(bits(x))
    return sorted(results)


def count_arrivals(comm: Communicator, delays_s: list[float]) -> float:
    """Seconds from this rank's arrival until it was let through."""
    time.sleep(delays_s[comm.rank])
    start = time.monotonic()
    comm.barrier()
    return time.monotonic() - start


def call(comm: Communicator, operation: str) -> None:
    x, wide = torch.ones(70_000), torch.ones(comm.size, 70_000)
    peer = comm.size - 1 if comm.rank < comm.size - 1 else 0
    match operation:
        case "all_reduce":
            comm.all_reduce_(x)
        case "all_gather":
            comm.all_gather(x, wide)
        case "all_to_all":
            comm.all_to_all(wide, torch.empty_like(wide))
        case "broadcast":
            for _ in range(200):  # the root need not wait for what can be buffered
                comm.broadcast_(x, 0)
        case "barrier":
            comm.barrier()
        case "recv":
            comm.recv(x, peer)
        case "send":
            for _ in range(200):
                comm.send(x, peer)


def loop(comm: Communicator, operation: str) -> None:
    while True:
        call(comm, operation)


def loop_sends(comm: Communicator, to_rank: int) -> None:
    while True:
        comm.send(torch.ones(70_000), to_rank)


def call_after_failure(comm: Communicator) -> tuple[float, list[str]]:
    """Seconds that every operation took together, and what did not raise."""
    start, silent = time.monotonic(), []
    for operation in (*OPERATIONS, "check"):
        try:
            comm.check() if operation == "check" else call(comm, operation)
        except PeerLost:
            continue
        silent.append(operation)
    return time.monotonic() - start, silent


def abort_soon(comm: Communicator, operation: str, after_s: float) -> None:
    timer = threading.Timer(after_s, comm.abort)
    timer.start()
    try:
        call(comm, operation)
    finally:
        timer.join()


def abort(comm: Communicator) -> None:
    comm.abort()
    comm.abort()


def close(comm: Communicator) -> None:
    comm.close()
    comm.close()
    comm.abort()  # nothing to abort, no error either


def num_files(comm: Communicator) -> int:
    return len(os.listdir("/proc/self/fd"))


def join_and_leave(comm: Communicator, meetings: list, timeout_s: float) -> None:
    for meeting in meetings:
        other = meeting.join(comm.rank, comm.size, timeout_s)
        sum_shape(other, (100,))
        comm.barrier()  # before all have what they need, nobody closes
        other.close()


# --- sums ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_are_those_in_the_order_of_the_ranks_and_the_same_on_all(group, dtype):
    results = group.run(sum_counts, dtype, COUNTS)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("size", [3, 4])
def test_the_numbers_that_sums_are_checked_with_show_the_order(size):
    terms = [numbers(rank, 1000) for rank in range(size)]
    assert bits(ordered_sum(terms)) != bits(ordered_sum(terms[::-1]))


def test_sums_of_other_shapes(group):
    for shape in [(1, 1), (7, 13), (2, 3, 5), ()]:
        group.run(sum_shape, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sums_with_infinities_not_a_number_and_zeros_of_both_signs(group, dtype):
    group.run(sum_specials, dtype)


@pytest.mark.parametrize("count", [5, 2**12, 2**18 + 1])
def test_sums_repeat_bit_by_bit(group, count):
    results = group.run(repeat_sum, count, 20)
    assert len(results[0]) == 1
    assert all(result == results[0] for result in results)


# --- copies ---

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
SHAPES = [(1,), (3, 5, 7), (4097,), (2, 40_001)]


@pytest.mark.parametrize("task", [gather, exchange, broadcast, pass_on])
def test_copies_of_any_dtype(group, task):
    group.run(for_each, task, [(dtype, shape) for dtype in DTYPES for shape in SHAPES])


@pytest.mark.parametrize("task", [gather, exchange, broadcast, pass_on])
def test_copies_of_eight_mebibytes(group, task):
    group.run(task, torch.float32, (2**21 // group.size,) if task is exchange else (2**21,))


def test_messages_come_in_their_order(group):
    group.run(many_messages, 200)


def test_operations_in_any_order(group):
    for seed in range(2):
        assert len(set(group.run(interleave, seed))) == 1


def test_nobody_passes_a_barrier_before_the_last_has_come(group):
    delays_s = [0.0] * group.size
    delays_s[-1] = 0.5
    waited_s = group.run(count_arrivals, delays_s)
    assert min(waited_s[:-1]) > 0.4


# --- joining ---


@pytest.mark.parametrize("delays_s", [(0.4, 0.0, 0.2), (0.0, 0.5, 0.1), (0.2, 0.1, 0.0)])
def test_ranks_join_in_any_order(create_group, delays_s):
    group = create_group(3, delays_s=delays_s)
    assert group.joined == {0: None, 1: None, 2: None}
    group.run(sum_shape, (100,))


def test_a_group_of_one(create_group):
    group = create_group(1)
    for task in (gather, exchange, broadcast):
        group.run(task, torch.float32, (1000,))
    group.run(sum_shape, (1000,))
    group.run(call, "barrier")


@pytest.mark.parametrize("missing", [0, 2])
def test_a_rank_that_never_joins_is_named(create_group, missing):
    group = create_group(3, timeout_s=SHORT_S, delays_s=[None if rank == missing else 0.0 for rank in range(3)])
    assert len(group.joined) == 2
    for result in group.joined.values():
        assert lost_ranks(result) == (missing,)
        assert f"rank {missing}" in str(result)
        assert result.took_s < SHORT_S + SLACK_S


# --- failures ---


def check_is_lost(group: Group, ranks: list[int], lost: tuple[int, ...], within_s: float) -> None:
    """The tasks under way on ``ranks`` have failed for want of ``lost``, and so does all that comes later, at once."""
    for result in group.results(ranks).values():
        assert lost_ranks(result) == lost
        assert result.took_s < within_s
    group.start(call_after_failure, ranks=ranks)
    for took_s, silent in group.results(ranks).values():
        assert silent == []
        assert took_s < SHORT_S


@pytest.mark.parametrize(
    "operation", ["all_reduce", "all_gather", "all_to_all", "broadcast", "barrier", "recv", "send"]
)
def test_a_rank_that_does_not_come_is_named(create_group, operation):
    group = create_group(3, timeout_s=SHORT_S)
    group.run(sum_shape, (100,))
    group.start(call, operation, ranks=[0, 1])
    check_is_lost(group, [0, 1], (2,), SHORT_S + SLACK_S)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("operation", ["all_reduce", "all_to_all"])
def test_a_rank_that_dies_or_hangs_in_the_midst_is_named(create_group, operation, number):
    group = create_group(3, timeout_s=SHORT_S)
    group.start(loop, operation)
    time.sleep(0.5)
    start = time.monotonic()
    group.signal(1, number)
    results = group.results([0, 2])
    assert time.monotonic() - start < SHORT_S + SLACK_S
    assert [lost_ranks(result) for result in results.values()] == [(1,), (1,)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_sender_that_dies_or_hangs_is_named(create_group, number):
    group = create_group(2, timeout_s=SHORT_S)
    group.start(loop, "recv", ranks=[0])
    group.start(loop_sends, 0, ranks=[1])
    time.sleep(0.3)
    group.signal(1, number)
    assert lost_ranks(group.results([0])[0]) == (1,)


@pytest.mark.parametrize("operation", ["all_reduce", "barrier", "recv", "send"])
def test_an_abort_from_another_thread_ends_what_is_under_way(create_group, operation):
    group = create_group(2, timeout_s=40.0)
    group.start(abort_soon, operation, 0.3, ranks=[0])
    result = group.results([0])[0]
    assert isinstance(result, Raised)
    assert isinstance(result.error, PeerLost)
    assert result.took_s < 0.3 + SLACK_S


def test_an_abort_reaches_the_peers(create_group):
    group = create_group(2, timeout_s=40.0)
    group.start(call, "all_reduce", ranks=[1])
    time.sleep(0.2)
    group.start(abort, ranks=[0])
    assert group.results([0]) == {0: None}
    result = group.results([1])[1]
    assert isinstance(result, Raised)
    assert isinstance(result.error, PeerLost)
    assert result.took_s < 0.2 + 2 * SLACK_S
    group.start(call_after_failure)
    assert all(silent == [] for _, silent in group.results().values())


# --- closing ---


def test_closing_twice_is_closing_and_what_is_closed_says_so(create_group):
    group = create_group(2)
    group.run(close)
    assert all(silent == [] for _, silent in group.run(call_after_failure))


def test_closing_waits_for_nobody(create_group):
    group = create_group(2)
    group.start(close, ranks=[0])
    assert group.results([0]) == {0: None}


def test_closed_groups_leave_no_files(create_group, backend):
    group, meetings = create_group(2), [MEETINGS[backend]() for _ in range(12)]
    group.run(join_and_leave, meetings[:2], 20.0)
    before = group.run(num_files)
    group.run(join_and_leave, meetings[2:], 20.0)
    assert group.run(num_files) == before
    assert not [meeting for meeting in meetings if isinstance(meeting, ShmMeeting) and os.path.exists(meeting.path)]


# --- misuse ---


def misuse(comm: Communicator) -> list[str]:
    """What was not refused."""
    x, accepted = torch.ones(4, 4), []
    for name, wrong in {
        "integers": lambda: comm.all_reduce_(torch.ones(3, dtype=torch.int64)),
        "a transposed tensor": lambda: comm.broadcast_(x.t()[:2], 0),
        "a result of another shape": lambda: comm.all_gather(x, torch.empty(comm.size, 4)),
        "a result of another dtype": lambda: comm.all_gather(x, torch.empty(comm.size, 4, 4, dtype=torch.int32)),
        "parts for another number of ranks": lambda: comm.all_to_all(torch.ones(9, 2), torch.ones(9, 2)),
        "a rank that is not": lambda: comm.send(x, comm.size),
        "itself": lambda: comm.recv(x, comm.rank),
    }.items():
        try:
            wrong()
        except ValueError:
            continue
        accepted.append(name)
    sum_shape(comm, (10,))
    return accepted


def test_wrong_tensors_and_ranks_are_refused_and_break_nothing(group):
    assert group.run(misuse) == [[]] * group.size
