"""The client of reward servers: what it sends, what it believes, where it connects, and what it never tells."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import time
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from reward_servers import Scripted, drips, lengths, says, serving

from data.schema import Message, Prompt
from pipeline.errors import ConfigError, DataError, ServerError
from pipeline.rules import ServerRule
from reward import client, connection
from reward.connection import addresses, is_public
from reward.mixture import RuleMixture
from reward.server import RewardServer

PROMPTS = [Prompt((Message("system", "Be kind."), Message("user", str(each))), {"answer": each}) for each in range(5)]
RESPONSES = ["a", "bb", "ccc", "dddd", "\u00e9\ud800"]
TOKEN = "s3cret-t0ken"


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between requests."""
    found: list[float] = []
    monkeypatch.setattr(client, "sleep", found.append)
    return found


def settings(server: Scripted, **others: Any) -> ServerRule:
    return ServerRule(url=server.url, hosts=["127.0.0.1"], **others)


def refusal(server: Scripted, count: int = 1, **others: Any) -> str:
    """The error that a server's answers end in."""
    with pytest.raises(ServerError) as caught:
        RewardServer(settings(server, **others)).rewards(PROMPTS[:count], RESPONSES[:count])
    assert caught.value.where == server.url
    return str(caught.value)


def test_rows_are_sent_as_the_protocol_says_in_batches_and_rewards_come_in_their_order() -> None:
    with serving(lengths) as server:
        found = RewardServer(settings(server, rows_per_request=2)).rewards(PROMPTS, RESPONSES)
    assert found == [1.0, 2.0, 3.0, 4.0, 2.0]
    assert [len(body["rows"]) for body in server.bodies] == [2, 2, 1]
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "4"}]
    assert server.bodies[-1] == {"rows": [{"prompt": messages, "response": "\u00e9\ud800", "facts": {"answer": 4}}]}
    assert server.headers[0]["host"] == f"127.0.0.1:{server.server_port}"
    assert server.headers[0]["content-type"] == "application/json"
    assert "authorization" not in server.headers[0]


def test_a_server_s_rewards_are_weighted_like_those_of_other_rules() -> None:
    with serving(lengths) as server:
        found = RuleMixture([settings(server, weight=-0.5)]).scores(PROMPTS[:2], RESPONSES[:2])
    assert found == [-0.5, -1.0]


def test_nothing_is_sent_for_no_rows() -> None:
    with serving(lengths) as server:
        assert RewardServer(settings(server)).rewards([], []) == []
    assert server.bodies == []


@pytest.mark.parametrize(
    "answer",
    [
        '{"rewards": [1]}',
        '{"rewards": [1, 2, 3]}',
        '{"rewards": [1, NaN]}',
        '{"rewards": [1, Infinity]}',
        '{"rewards": [1, 1e999]}',
        '{"rewards": [1, ' + "9" * 5000 + "]}",
        '{"rewards": [1, true]}',
        '{"rewards": [1, "2"]}',
        '{"rewards": [1, null]}',
        '{"rewards": {"0": 1, "1": 2}}',
        '{"reward": [1, 2]}',
        "[1, 2]",
        "[" * 9000,
        '{"rewards": [1, 2]} and more',
        "",
    ],
)
def test_anything_but_one_finite_number_per_row_is_refused(answer: str) -> None:
    with serving(says(answer)) as server:
        assert "expected 2 finite numbers" in refusal(server, 2)
    assert len(server.bodies) == 1


def test_whole_numbers_large_and_negative_ones_are_rewards() -> None:
    with serving(says('{"rewards": [3, -1e6, 0.25], "note": "kept to itself"}')) as server:
        found = RewardServer(settings(server)).rewards(PROMPTS[:3], RESPONSES[:3])
    assert found == [3.0, -1e6, 0.25]


def test_an_answer_of_any_length_is_read_up_to_its_bound_only() -> None:
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    with serving(says(" " * 20_000), lambda handler: handler.wfile.write(endless) and None) as server:
        assert "its answer is larger than 10,100 bytes" in refusal(server)
        assert "its answer is larger than 10,100 bytes" in refusal(server)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again_after_longer_and_longer_waits(status: int, waits: list[float]) -> None:
    busy = says("later", status)
    with serving(busy, busy, busy, lengths) as server:
        assert RewardServer(settings(server)).rewards(PROMPTS[:1], RESPONSES[:1]) == [1.0]
    assert waits == [0.5, 1.0, 2.0]
    assert server.bodies == [server.bodies[0]] * 4


def test_requests_are_repeated_as_often_as_the_settings_say_and_waits_are_bounded(waits: list[float]) -> None:
    with serving(says("later", 503)) as server:
        assert "9 requests failed, the last one: it answered 503 Service Unavailable" in refusal(server, retries=8)
        assert "1 requests failed" in refusal(server, retries=0)
    assert len(server.bodies) == 10
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize("status", [201, 204, 400, 401, 403, 404, 413, 422])
def test_any_other_status_is_final(status: int) -> None:
    with serving(says("no" if status != 204 else "", status)) as server:
        assert f"it answered {status} " in refusal(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with serving(lengths) as elsewhere, serving(says("", status, Location=elsewhere.url)) as server:
        assert "redirects are not followed" in refusal(server)
    assert elsewhere.bodies == []


def test_a_broken_answer_is_asked_for_again() -> None:
    cut = b'HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n{"rewards": ['
    answers = [drips(raw, 0) for raw in (b"", b"nonsense\r\n\r\n", cut)]
    with serving(*answers, lengths) as server:
        assert RewardServer(settings(server)).rewards(PROMPTS[:1], RESPONSES[:1]) == [1.0]
    assert len(server.bodies) == 4


def test_a_server_that_does_not_run_is_named(waits: list[float]) -> None:
    with serving(lengths) as server:
        rule = settings(server, retries=1)
    with pytest.raises(ServerError, match="2 requests failed, the last one: Connection refused"):
        RewardServer(rule).rewards(PROMPTS, RESPONSES)
    assert waits == [0.5]


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 100,
        b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n" + b" " * 400,
        b'HTTP/1.0 200 OK\r\n\r\n{"rewards": [1.0' + b"0" * 400,
    ],
)
def test_the_time_of_a_request_is_bounded_however_slowly_bytes_arrive(raw: bytes) -> None:
    began = time.monotonic()
    with serving(drips(raw, 0.02)) as server:
        assert "it took too long" in refusal(server, timeout=0.4, retries=1)
    assert 0.8 < time.monotonic() - began < 5
    assert len(server.bodies) == 2


def test_the_token_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    answers = [
        says(TOKEN, 401, TOKEN),
        says(TOKEN, 302, TOKEN, Location=f"/{TOKEN}"),
        says(TOKEN),
        says(f'{{"rewards": ["{TOKEN}"]}}'),
        drips(f"{TOKEN}\r\n\r\n".encode(), 0),
        drips(f"HTTP/1.1 {TOKEN} OK\r\n\r\n".encode(), 0),
        says(TOKEN, 503, TOKEN),
    ]
    with serving(*answers) as server:
        rule = settings(server, token_variable="REWARD_TOKEN", retries=0)
        for _ in range(len(answers)):
            with pytest.raises(ServerError) as caught:
                RewardServer(rule).rewards(PROMPTS[:1], RESPONSES[:1])
            error: BaseException | None = caught.value
            assert TOKEN not in f"{error!r} {error} {error.__cause__}"
            assert error.__suppress_context__ or error.__context__ is None
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {TOKEN}"}
    assert TOKEN not in f"{rule!r} {rule.model_dump_json()}"


@pytest.mark.parametrize(("token", "what"), [(None, "is not set"), ("", "is not set"), (f"{TOKEN}\n", "printable")])
def test_a_token_that_cannot_be_sent_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, token: str | None, what: str
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("REWARD_TOKEN", token)
    rule = ServerRule(url="http://localhost:1/", hosts=["localhost"], token_variable="REWARD_TOKEN")
    with pytest.raises(ConfigError, match=f"the environment variable REWARD_TOKEN .*{what}") as caught:
        RuleMixture([rule])
    assert TOKEN not in str(caught.value)


def test_facts_that_json_cannot_say_are_an_error_of_the_row() -> None:
    prompt = Prompt(PROMPTS[0].prompt, {"answer": float("nan")}, "f.parquet:3")
    with serving(lengths) as server, pytest.raises(DataError, match=r"f.parquet:3: .*cannot be sent as JSON"):
        RewardServer(settings(server)).rewards([prompt], ["a"])
    assert server.bodies == []


def test_proxies_of_the_environment_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lengths) as proxy, serving(lengths) as server:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.setenv("no_proxy", "")
        assert RewardServer(settings(server)).rewards(PROMPTS[:1], RESPONSES[:1]) == [1.0]
    assert proxy.bodies == []


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"])
def test_link_local_addresses_are_refused_however_they_are_written(address: str) -> None:
    assert not connection._is_allowed(address, ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_addresses_on_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("255.255.255.255", "224.0.0.1", "240.0.0.1", "192.0.0.1", "198.18.0.1", "203.0.113.5"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "fc00::1", "fec0::1", "ff02::1", "2001:db8::1"),
        *("::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1"),
        *("2002:7f00:1::1", "2002:a9fe:a9fe::1", "2001::1", "::7f00:1", "4000::1"),
    ],
)
def test_private_local_and_disguised_addresses_are_not_public(address: str) -> None:
    assert not is_public(ip_address(address))


def resolving(monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> list[str]:
    """Make names lead to addresses; returns the names that are asked for. Other names have none."""
    real, asked = socket.getaddrinfo, []

    def fake(host: str, port: int, *others: Any, **options: Any) -> list[Any]:
        if all(character in "0123456789.:" for character in host):
            return list(real(host, port, *others, **options))
        asked.append(host)
        found = names.get(host.partition(".")[0], [])
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    return asked


@pytest.mark.parametrize(
    "found", [["127.0.0.1"], ["169.254.169.254"], ["10.0.0.7"], ["::1"], ["8.8.8.8", "192.168.0.1"]]
)
def test_a_name_with_any_address_inside_is_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, waits: list[float], found: list[str]
) -> None:
    resolving(monkeypatch, inside=found)
    with serving(lengths) as server:
        url = f"http://inside.example:{server.server_port}/"
        rule = ServerRule(url=url, hosts=["inside.example"])
        with pytest.raises(ConfigError, match=f"`inside.example` has the address {found[-1]}"):
            RewardServer(rule).rewards(PROMPTS, RESPONSES)
    assert (server.bodies, waits) == ([], [])


def test_localhost_is_this_machine_and_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lengths) as server:
        asked = resolving(monkeypatch, localhost=["::1", "127.0.0.1"])
        rule = ServerRule(url=f"http://localhost:{server.server_port}/", hosts=["localhost"])
        assert RewardServer(rule).rewards(PROMPTS[:1], RESPONSES[:1]) == [1.0]
        assert asked == ["localhost"]
        resolving(monkeypatch, localhost=["8.8.8.8"])
        with pytest.raises(ConfigError, match=r"`localhost` has the address 8\.8\.8\.8"):
            RewardServer(rule).rewards(PROMPTS[:1], RESPONSES[:1])


def test_a_name_without_an_address_may_get_one_later(monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    resolving(monkeypatch)
    rule = ServerRule(url="http://new.example/", hosts=["new.example"], retries=2)
    with pytest.raises(ServerError, match="3 requests failed, the last one: Name or service not known"):
        RewardServer(rule).rewards(PROMPTS, RESPONSES)
    assert waits == [0.5, 1.0]


def test_literal_addresses_are_taken_as_they_are_but_for_those_of_no_one_host() -> None:
    for literal in ("10.0.0.7", "127.0.0.1", "8.8.8.8"):
        assert addresses(literal, 80) == [ip_address(literal)]
    for literal in ("169.254.169.254", "224.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigError, match="no server of that name may have"):
            addresses(literal, 80)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_a_certificate_must_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*made, *subject, *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with serving(lengths) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        port = server.server_port
        rule = ServerRule(url=f"https://localhost:{port}/", hosts=["localhost"])
        with pytest.raises(ServerError, match="its certificate does not hold"):
            RewardServer(rule).rewards(PROMPTS[:1], RESPONSES[:1])
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert RewardServer(rule).rewards(PROMPTS[:1], RESPONSES[:1]) == [1.0]
        other = ServerRule(url=f"https://127.0.0.1:{port}/", hosts=["127.0.0.1"])
        with pytest.raises(ServerError, match="its certificate does not hold"):
            RewardServer(other).rewards(PROMPTS[:1], RESPONSES[:1])
    assert waits == []
