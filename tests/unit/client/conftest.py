import pytest
from scripted_server import ScriptedServer

from cluster.client import Client


@pytest.fixture
def server():
    server = ScriptedServer()
    yield server
    server.stop()


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client
