"""TLS, mutual TLS and tokens of both clients."""

import grpc
import pytest
from certificates import Authority
from scripted_server import ScriptedServer, chunks_of, response_of

from cluster.client import AsyncClient, Client, Credentials
from cluster.errors import ConfigError, ServerUnreachable


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def serve_tls(authority):
    started = []

    def serve(*, mutual=False):
        server = authority.issue("gateway")
        credentials = grpc.ssl_server_credentials(
            [(server.key, server.certificate)],
            root_certificates=authority.pem if mutual else None,
            require_client_auth=mutual,
        )
        started.append(ScriptedServer(credentials))
        started[-1].script("Generate", response_of("x"))
        return started[-1]

    yield serve
    for server in started:
        server.stop()


@pytest.fixture
def files(tmp_path, authority):
    """Paths of a CA, and of a client's certificate and key."""
    client = authority.issue("client")
    contents = {"ca_file": authority.pem, "cert_file": client.certificate, "key_file": client.key}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: tmp_path / name for name in contents}


async def text_of(server, credentials):
    """What both clients get."""
    with Client(server.address, credentials=credentials, max_attempts=1) as client:
        text = client.generate("x").text
    async with AsyncClient(server.address, credentials=credentials, max_attempts=1) as client:
        assert (await client.generate("x")).text == text
    return text


async def test_tls(serve_tls, files):
    assert await text_of(serve_tls(), Credentials(ca_file=files["ca_file"])) == "x"


async def test_a_server_that_nobody_vouches_for_is_not_talked_to(serve_tls, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(Authority("another").pem)
    for credentials in (Credentials(ca_file=other), Credentials(tls=True), Credentials()):
        with pytest.raises(ServerUnreachable):
            await text_of(serve_tls(), credentials)


async def test_a_certificate_for_another_name(serve_tls, files):
    with pytest.raises(ServerUnreachable):
        await text_of(serve_tls(), Credentials(ca_file=files["ca_file"], server_name="elsewhere"))
    assert await text_of(serve_tls(), Credentials(ca_file=files["ca_file"], server_name="localhost")) == "x"


async def test_mutual_tls(serve_tls, files):
    server = serve_tls(mutual=True)
    assert await text_of(server, Credentials(**files)) == "x"
    with pytest.raises(ServerUnreachable):
        await text_of(server, Credentials(ca_file=files["ca_file"]))


async def test_the_token_goes_with_every_call_and_is_asked_for_each_time(server):
    shown = []

    def noting(answer):
        def wrapped(request, context):
            shown.append(dict(context.invocation_metadata()).get("authorization"))
            return answer

        return wrapped

    server.script("Generate", noting(response_of("x")))
    server.script("GenerateStream", noting(chunks_of("a")))
    tokens = iter("abcd")
    credentials = Credentials(token=lambda: next(tokens))
    with Client(server.address, credentials=credentials) as client:
        client.generate("x")
        list(client.stream("x"))
    async with AsyncClient(server.address, credentials=credentials) as client:
        await client.generate("x")
        [chunk async for chunk in client.stream("x")]
    assert shown == ["Bearer a", "Bearer b", "Bearer c", "Bearer d"]


@pytest.mark.parametrize("address", ["10.0.0.1:1", "gateway:1", "127.0.0.1:1,10.0.0.1:1", "[2001:db8::1]:1"])
def test_a_token_never_goes_over_the_network_in_the_clear(address):
    with pytest.raises(ConfigError, match="unencrypted") as caught:
        Client(address, credentials=Credentials(token="secret"))
    assert caught.value.field == "token"
    assert "secret" not in str(caught.value)
    Client(address, credentials=Credentials(token="secret", tls=True)).close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/gateway"])
def test_on_this_machine_it_may(address):
    Client(address, credentials=Credentials(token="secret")).close()


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"cert_file": "a.pem"}, "cert_file"),
        ({"key_file": "a.pem"}, "cert_file"),
        ({"server_name": "gateway"}, "server_name"),
    ],
)
def test_what_does_not_go_together(values, field):
    with pytest.raises(ConfigError) as caught:
        Credentials(**values)
    assert caught.value.field == field


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere") as caught:
        Client("127.0.0.1:1", credentials=Credentials(ca_file=tmp_path / "nowhere"))
    assert caught.value.field == "ca_file"


def test_a_token_does_not_end_up_in_a_log():
    assert "secret" not in repr(Credentials(token="secret"))
