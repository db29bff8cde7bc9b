"""Chat through a pipe and through a terminal."""

import json
import os
import pty
import select
import subprocess

import pytest
from scripted_server import chunks_of, hanging

from cluster import errors
from cluster.v1 import inference_pb2 as pb


@pytest.fixture(autouse=True)
def _template(server):
    server.script("CountTokens", pb.CountTokensResponse(tokens=5))


def turns(server):
    """The conversations sent, as (role's first letter, text) pairs."""
    return [
        [(message.role[0], message.content[0].text) for message in request.chat.messages]
        for request in server.requests
        if isinstance(request, pb.GenerateRequest)
    ]


def test_each_piped_line_is_a_turn_that_knows_the_ones_before(cli, server):
    server.script("GenerateStream", chunks_of("hel", "lo"), chunks_of("bye"))
    done = cli("chat", "--system", "Be kind.", "--temperature", "0", "--max-tokens", "7", stdin="hi\n\nand now?\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\nbye\n", "")
    assert turns(server) == [
        [("s", "Be kind."), ("u", "hi")],
        [("s", "Be kind."), ("u", "hi"), ("a", "hello"), ("u", "and now?")],
    ]
    assert (server.requests[1].sampling.temperature, server.requests[1].sampling.max_tokens) == (0, 7)


def test_reset_and_exit(cli, server):
    server.script("GenerateStream", chunks_of("ok"))
    done = cli("chat", "--system", "S", stdin="one\n/what\n/reset\ntwo\n/exit\nthree\n")
    assert (done.returncode, done.stdout) == (0, "ok\nok\n")
    assert "no such command: /what" in done.stderr
    assert turns(server) == [[("s", "S"), ("u", "one")], [("s", "S"), ("u", "two")]]


def test_a_model_without_a_template_is_told_before_the_first_line(cli, server):
    server.script("CountTokens", errors.InvalidRequest("the model 'demo' has no chat template", field="chat"))
    done = cli("chat", stdin="hi\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the model 'demo' has no chat template")
    assert "cluster generate" in done.stderr
    assert turns(server) == []


def test_a_piped_turn_that_fails_is_1(cli, server):
    server.script("GenerateStream", chunks_of("ok"), errors.Overloaded("full"))
    done = cli("chat", stdin="one\ntwo\nthree\n")
    assert (done.returncode, done.stdout, done.stderr) == (1, "ok\n", "error: full\n")


def test_json_is_one_object_per_chunk(cli, server):
    server.script("GenerateStream", chunks_of("hel", "lo"), chunks_of("bye"))
    done = cli("chat", "--json", stdin="hi\nand now?\n")
    chunks = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (0, "")
    assert [(chunk["text"], chunk["finish_reason"]) for chunk in chunks] == [
        ("hel", None),
        ("lo", "stop"),
        ("bye", "stop"),
    ]
    assert turns(server)[1] == [("u", "hi"), ("a", "hello"), ("u", "and now?")]


class Terminal:
    """A pseudo-terminal with ``cluster chat`` on it."""

    def __init__(self, spawn, *options, stdout=None):
        self._master, slave = pty.openpty()
        self.process = spawn(
            "chat", *options, stdin=slave, stdout=stdout or slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self._seen = b""

    def read_until(self, text):
        while text not in self._seen:
            self._seen += os.read(self._master, 4096)
        before, _, self._seen = self._seen.partition(text)
        return before

    def type(self, keys):
        os.write(self._master, keys)

    def press_until(self, key, text):
        """Presses again where nothing happens: CPython overlooks a signal just before it begins to wait for a key."""
        while text not in self._seen:
            self.type(key)
            while text not in self._seen and select.select([self._master], [], [], 1)[0]:
                self._seen += os.read(self._master, 4096)
        self.read_until(text)

    def hang_up(self):
        if self._master is not None:
            os.close(self._master)
        self._master = None


@pytest.fixture
def terminal(spawn, server):
    terminal = Terminal(spawn)
    yield terminal
    terminal.hang_up()


CTRL_C, CTRL_D = b"\x03", b"\x04"


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal, server):
    server.script("GenerateStream", hanging(*chunks_of("par", "tial")[:1]), chunks_of("again"))
    terminal.read_until(b"> ")
    terminal.type(b"hi\n")
    terminal.read_until(b"par")
    terminal.type(CTRL_C)
    terminal.read_until(b"(stopped)")
    assert server.ended.get(timeout=30) == "GenerateStream"
    terminal.read_until(b"> ")
    terminal.type(b"more\n")
    terminal.read_until(b"again")
    terminal.read_until(b"> ")
    terminal.press_until(CTRL_C, b"Ctrl-D leaves")  # at the prompt it only says how to leave
    terminal.read_until(b"> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(timeout=60) == 0
    assert turns(server) == [[("u", "hi")], [("u", "hi"), ("a", "par"), ("u", "more")]]


def test_a_failed_turn_does_not_end_the_conversation(terminal, server):
    server.script("GenerateStream", errors.Overloaded("too full"), chunks_of("fine"))
    terminal.read_until(b"> ")
    terminal.type(b"one\n")
    terminal.read_until(b"error: too full")
    terminal.read_until(b"> ")
    terminal.type(b"two\n")
    terminal.read_until(b"fine")
    terminal.read_until(b"> ")
    terminal.type(b"/exit\n")
    assert terminal.process.wait(timeout=60) == 0
    assert turns(server) == [[("u", "one")], [("u", "two")]]


def test_json_from_a_terminal_is_nothing_but_json(spawn, server):
    server.script("GenerateStream", hanging(*chunks_of("par", "tial")[:1]), chunks_of("fine"))
    terminal = Terminal(spawn, "--json", stdout=subprocess.PIPE)
    try:
        terminal.read_until(b"Ctrl-D leaves")
        terminal.type(b"one\n")
        assert json.loads(terminal.process.stdout.readline())["text"] == "par"
        terminal.press_until(CTRL_C, b"(stopped)")
        terminal.type(b"two\n")
        assert json.loads(terminal.process.stdout.readline())["text"] == "fine"
        terminal.type(CTRL_D)
        assert terminal.process.wait(timeout=60) == 0
        assert terminal.process.stdout.read() == b""
    finally:
        terminal.hang_up()


def test_the_process_is_gone_with_its_terminal(terminal):
    terminal.read_until(b"> ")
    terminal.hang_up()
    terminal.process.wait(timeout=60)
