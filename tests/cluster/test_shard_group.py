"""Processes of a group: how they start, run steps, and end together. The shards have no model, all else is real."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import psutil
import pytest
from scripted_group import COMMAND, TESTS, create_group, create_step
from scripted_shard import NUM_BLOCKS

from cluster.distributed.frames import connect
from cluster.errors import CheckpointError, ClusterError, ConfigError, EngineFault
from cluster.worker.group_executor import GroupExecutor
from cluster.worker.group_member import GroupLost
from cluster.worker.messages import Hello, encode
from cluster.worker.process_launcher import ProcessLauncher

SOON_S = 20.0  # much longer than it takes, for machines that are busy


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Whatever a test does to a group, no process, file or thread of it stays."""
    files, threads = leftovers(), threading.active_count()
    processes = set(psutil.Process().children(recursive=True))  # of other tests: a server that forks, Ray
    yield
    await_true(lambda: set(psutil.Process().children(recursive=True)) <= processes, "processes are left")
    await_true(lambda: leftovers() <= files, f"files are left: {leftovers() - files}")
    await_true(lambda: threading.active_count() <= threads, "threads are left")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, dict[str, list[object]]]], None]:
    return lambda actions: monkeypatch.setenv("SHARD_SCRIPT", json.dumps(actions))


@contextlib.contextmanager
def running(*sizes: int, **options: float) -> Iterator[GroupExecutor]:
    executor = create_group(*sizes, **options)
    try:
        yield executor
    finally:
        executor.shutdown()


def leftovers() -> set[Path]:
    return set(Path("/dev/shm").glob("cluster-*"))


def await_true(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def pids(executor: GroupExecutor) -> list[int]:
    return [member.hello.pid for member in executor._members]


def await_gone(processes: list[int]) -> None:
    await_true(lambda: not any(map(is_alive, processes)), f"one of {processes} lives on")


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def watch(executor: GroupExecutor) -> Future[ClusterError]:
    heard: Future[ClusterError] = Future()
    executor.lost.add_done_callback(lambda lost: heard.set_result(lost.result()))
    return heard


def run_steps(executor: GroupExecutor, first: int, last: int) -> None:
    for step_id in range(first, last):
        executor.submit(create_step(step_id))
        output = executor.collect()
        assert output.step_id == step_id
        assert {sequence: token.token_id for sequence, token in output.sampled.items()} == {
            sequence: sequence + step_id for sequence in range(3)
        }


def start_leader(kind: str) -> subprocess.Popen[str]:
    leader = subprocess.Popen(
        [sys.executable, str(TESTS / "scripted_group.py"), kind],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        start_new_session=True,
    )
    assert leader.stdout.readline().strip() == str(leader.pid)
    return leader


class TestStart:
    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_ranks_start_in_any_order(self, script, order):
        script({order[0]: {"connect": ["sleep", 0.5], "load": ["sleep", 0.3]}, order[1]: {"join": ["sleep", 0.3]}})
        with running() as executor:
            run_steps(executor, 0, 20)

    def test_what_the_group_has_is_what_its_smallest_rank_has(self):
        stages: list[str] = []
        executor = create_group(2, 1, stages=stages)
        try:
            assert executor.model.num_blocks == NUM_BLOCKS
            assert (executor.model.tp_size, executor.model.pp_size) == (2, 1)
            assert executor.max_in_flight == 1
            assert stages[0] == "starting 2 shards"
            assert "loading weights" in stages
        finally:
            executor.shutdown()

    def test_a_pipelines_layers_follow_the_measured_times(self, tmp_path):
        (tmp_path / "config.json").write_text(
            json.dumps({"num_hidden_layers": 9, "architectures": ["NoneForCausalLM"]})
        )
        with running(1, 2, checkpoint=tmp_path) as executor:
            # The head, on the second stage, takes as long as three layers.
            assert executor.model.architecture == "layers (6, 9)"
            assert executor.max_in_flight == 3
            for step_id in range(3):
                executor.submit(create_step(step_id))
            with pytest.raises(EngineFault, match="before those under way"):
                executor.submit(create_step(3))
            assert [executor.collect().step_id for _ in range(3)] == [0, 1, 2]

    @pytest.mark.parametrize(
        ("moment", "what"),
        [
            ("connect", "rank 1 on a node not known yet: not connected"),
            ("join", "not joined the group"),
            ("load", "not loaded their part"),
            ("allocate", "not allocated their KV cache and warmed up"),
        ],
    )
    def test_a_late_rank_is_named_with_node_and_stage(self, script, moment, what):
        script({1: {moment: ["sleep", 600]}})
        with pytest.raises(GroupLost) as lost:
            create_group(start_timeout_s=3.0)
        assert what in lost.value.message
        assert "rank 1 on " in lost.value.message
        assert "rank 0" not in lost.value.message
        if moment != "connect":
            assert os.uname().nodename in lost.value.message
        assert lost.value.ranks == (1,)

    def test_a_rank_that_ends_before_it_connects_is_no_matter_of_a_deadline(self, script):
        script({1: {"connect": ["exit", 3]}})
        with pytest.raises(GroupLost, match=r"rank 1 exited with status 3; .*about to exit.*before it had connected"):
            create_group(start_timeout_s=600.0)

    def test_a_rank_that_ends_while_it_loads(self, script):
        script({1: {"load": ["exit", 3]}})
        with pytest.raises(GroupLost, match=r"rank 1 \(pid \d+ on .*\) is gone: its process exited with status 3"):
            create_group()

    @pytest.mark.parametrize("error", [ConfigError, CheckpointError])
    def test_what_a_rank_finds_wrong_is_raised_as_what_it_is(self, script, error):
        script({1: {"load": ["fail", error.__name__, "raise the roof"]}})
        with pytest.raises(error, match=r"rank 1 .*: raise the roof"):
            create_group()

    def test_a_process_that_cannot_be_started(self):
        with pytest.raises(EngineFault, match="cannot be started"):
            create_group(launcher=ProcessLauncher(2, command=("/nowhere/python",)))

    def test_strangers_with_and_without_the_secret_are_turned_away(self):
        class WithStrangers(ProcessLauncher):
            def launch(self, rank: int, address: str, secret: str) -> None:
                with pytest.raises(EngineFault):
                    connect(address, "another secret, long enough")
                for hello in (b"rubbish", encode(Hello(rank=7, channel="work", pid=1, host="h", machine="m"))):
                    stranger = connect(address, secret)
                    stranger.send(hello)
                    strangers.append(stranger)
                super().launch(rank, address, secret)

        strangers: list = []
        with running(launcher=WithStrangers(2, command=COMMAND)) as executor:
            run_steps(executor, 0, 5)
        for stranger in strangers:
            stranger.close()

    def test_a_shard_with_a_wrong_secret_never_joins(self, capfd):
        class WrongSecret(ProcessLauncher):
            def launch(self, rank: int, address: str, secret: str) -> None:
                super().launch(rank, address, secret if rank == 0 else "another secret, long enough")

        with pytest.raises(GroupLost, match=r"rank 1 exited with status 1; .*do both ends know the same secret"):
            create_group(launcher=WrongSecret(2, command=COMMAND))
        assert "[rank 1] the group's leader is lost" in capfd.readouterr().err

    def test_shards_of_other_nodes_come_over_tcp(self):
        class FromOtherNodes(ProcessLauncher):
            host = "127.0.0.1"

            def launch(self, rank: int, address: str, secret: str) -> None:
                addresses.append(address)
                super().launch(rank, address, secret)

        addresses: list[str] = []
        with running(launcher=FromOtherNodes(2, command=COMMAND)) as executor:
            run_steps(executor, 0, 20)
            assert all(address.startswith("tcp:127.0.0.1:") for address in addresses)
            heard, processes = watch(executor), pids(executor)
            os.kill(processes[1], signal.SIGKILL)
            assert "rank 1" in heard.result(SOON_S).message
            await_gone(processes)


class TestEnd:
    def test_shutdown_ends_all_processes(self):
        with running() as executor:
            run_steps(executor, 0, 3)
            processes = pids(executor)
            lost = executor.lost
        assert not any(map(is_alive, processes))
        assert lost.cancelled()
        executor.shutdown()
        with pytest.raises(EngineFault):
            executor.submit(create_step(3))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_killed_rank_ends_an_idle_group(self, rank):
        with running() as executor:
            run_steps(executor, 0, 3)
            heard, processes = watch(executor), pids(executor)
            os.kill(processes[rank], signal.SIGKILL)
            fault = heard.result(SOON_S)
            assert isinstance(fault, GroupLost)
            assert f"rank {rank} (pid {processes[rank]} on {os.uname().nodename}) is gone" in fault.message
            assert "signal 9" in fault.message
            assert fault.ranks == (rank,)
            await_gone(processes)
            with pytest.raises(EngineFault) as raised:
                executor.submit(create_step(3))
            assert raised.value is fault

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_killed_rank_ends_a_group_within_a_step(self, script, rank):
        script({rank: {"step": ["sleep", 600]}, 1 - rank: {"step": ["sleep", 600]}})
        with running() as executor:
            processes = pids(executor)
            executor.submit(create_step(0))
            threading.Timer(0.2, os.kill, (processes[rank], signal.SIGKILL)).start()
            with pytest.raises(GroupLost, match=rf"rank {rank} \(pid {processes[rank]} on .*is gone"):
                executor.collect()
            await_gone(processes)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_stopped_rank_ends_an_idle_group(self, rank):
        with running(step_timeout_s=2.0) as executor:
            heard, processes = watch(executor), pids(executor)
            os.kill(processes[rank], signal.SIGSTOP)
            fault = heard.result(SOON_S)
            assert f"rank {rank} (pid {processes[rank]} on" in fault.message
            assert "no answer for 2 s" in fault.message
            await_gone(processes)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_stopped_rank_ends_a_group_within_a_step_and_those_that_wait_for_it_are_not_blamed(self, script, rank):
        script({0: {"step": ["sleep", 600]}, 1: {"step": ["sleep", 600]}})
        with running(step_timeout_s=3.0) as executor:
            processes = pids(executor)
            os.kill(processes[rank], signal.SIGSTOP)
            executor.submit(create_step(0))
            with pytest.raises(GroupLost) as lost:
                executor.collect()
            assert f"rank {rank} (pid {processes[rank]}" in lost.value.message
            assert lost.value.ranks == (rank,)
            await_gone(processes)

    def test_a_step_past_its_deadline_names_who_has_not_done_it(self, script):
        script({0: {"step": ["sleep", 600]}})
        with running(step_timeout_s=1.0) as executor:
            executor.submit(create_step(0))
            with pytest.raises(GroupLost, match=r"step 0 has taken 1 s: rank 0 \(pid .*has not done it") as lost:
                executor.collect()
            assert lost.value.ranks == (0,)

    def test_a_rank_that_waits_in_a_collective_is_not_left_there(self, script):
        script(
            {0: {"step": ["sum"]}, 1: {"step": ["sleep", 600], "join": ["sum"]}}
            | {0: {"step": ["sum"], "join": ["sum"]}}
        )
        with running(start_timeout_s=120.0) as executor:
            processes = pids(executor)
            executor.submit(create_step(0))
            threading.Timer(0.3, os.kill, (processes[1], signal.SIGKILL)).start()
            with pytest.raises(GroupLost, match=r"rank 1 .*is gone"):
                executor.collect()
            await_gone(processes)

    def test_a_failing_step_says_what_failed(self, script, capfd):
        script({1: {"step": ["fail", "EngineFault", "out of luck"]}, 0: {"step": ["sleep", 600]}})
        with running() as executor:
            processes = pids(executor)
            executor.submit(create_step(0))
            with pytest.raises(GroupLost, match=r"rank 1 \(pid .*\): out of luck"):
                executor.collect()
            await_gone(processes)  # all of them, and their memory with them
        assert "[rank 1] " in capfd.readouterr().err

    @pytest.mark.parametrize("channel", ["work", "control"])
    def test_rubbish_from_a_rank_ends_its_group(self, channel):
        """Whatever its process is, it is no shard of this version."""
        with running() as executor:
            heard = watch(executor)
            run_steps(executor, 0, 2)
            # What rank 1 would write: the two ends of a connection are alike, so its own bytes are put in by hand.
            member = executor._members[1]
            getattr(member, channel)._buffer[:8] = b"\x04\0\0\0\xc1\xc1\xc1\xc1"
            getattr(member, channel)._start, getattr(member, channel)._end = 0, 8
            if channel == "work":
                executor.submit(create_step(2))
                with pytest.raises(EngineFault):
                    executor.collect()
            assert "rank 1" in heard.result(SOON_S).message

    def test_groups_live_side_by_side(self):
        with running() as other:
            with running() as executor:
                run_steps(executor, 0, 5)
                run_steps(other, 0, 5)
                os.kill(pids(executor)[0], signal.SIGKILL)
                assert watch(executor).result(SOON_S) is not None
            run_steps(other, 5, 10)
            assert not other.lost.done()

    def test_an_executor_that_nobody_holds_ends_its_group(self):
        executor = create_group()
        processes = pids(executor)
        del executor
        await_gone(processes)

    def test_shards_outlive_the_thread_that_started_them(self):
        """The kernel kills a process that asked for it when the thread that started it ends."""
        made: list[GroupExecutor] = []
        thread = threading.Thread(target=lambda: made.append(create_group()))
        thread.start()
        thread.join()
        try:
            run_steps(made[0], 0, 5)
        finally:
            made.pop().shutdown()


class TestLeaderEnds:
    @pytest.mark.parametrize("kind", ["lead", "outside"])
    @pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    def test_shards_end_by_themselves(self, kind, end):
        """Where the leader started them, and where somebody else did: those have only the socket to go by."""
        leader = start_leader(kind)
        shards = []
        try:
            if kind == "outside":
                for _ in range(2):
                    rank, address, secret = leader.stdout.readline().split()
                    arguments = ["--rank", rank, "--address", address, "--parent", str(os.getpid())]
                    environment = os.environ | {"CLUSTER_GROUP_SECRET": secret}
                    shards.append(subprocess.Popen([*COMMAND, *arguments], env=environment))
            ready, *processes = leader.stdout.readline().split()
            assert ready == "ready"
            assert all(is_alive(int(pid)) for pid in processes)
            # Ctrl-C reaches all processes of the terminal.
            os.killpg(leader.pid, end) if end == signal.SIGINT else leader.send_signal(end)
            leader.wait(SOON_S)
            await_gone([int(pid) for pid in processes])
            assert [shard.wait(SOON_S) for shard in shards] == [0] * len(shards)
        finally:
            leader.kill()
            leader.wait()
            leader.stdout.close()
