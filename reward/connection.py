"""A connection to a server that leads nowhere else.

Whoever answers for a name can make it point into the network that trains, at a cloud's metadata service for one
(server-side request forgery). So a name is resolved once, all its addresses are checked, and one of those is connected
to. Proxies of the environment are not asked, and the connection is cut when its time is over, however slowly bytes
arrive.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from pipeline.errors import ConfigError
from pipeline.servers import Server

Address = IPv4Address | IPv6Address

UNICAST = ip_network("2000::/3")
"""The only IPv6 addresses that are given out for the internet (RFC 4291, 2.4)."""
TRANSLATED = ip_network("64:ff9b::/96")
"""IPv4 addresses as IPv6 networks write them (RFC 6052); the last 32 bits are the address."""


@contextmanager
def connected(server: Server) -> Iterator[http.client.HTTPConnection]:
    """A connection to a server, closed in the end and cut after `server.timeout` seconds.

    Raises:
        ConfigError: The server's name leads to an address that is not allowed.
        TimeoutError: The time is over, whatever was being done.
        OSError: The server cannot be reached, or its certificate does not hold.
    """
    deadline = time.monotonic() + server.timeout
    connection = http.client.HTTPConnection(server.host, server.port)
    with _opened(server, deadline) as stream:
        connection.sock = stream
        timer = threading.Timer(_left(deadline), _cut, [stream])
        timer.start()
        try:
            if isinstance(stream, ssl.SSLSocket):
                stream.do_handshake()
            yield connection
        except (OSError, http.client.HTTPException):
            _left(deadline)
            raise
        finally:
            timer.cancel()
            timer.join()
        _left(deadline)


def addresses(host: str, port: int) -> list[Address]:
    """The addresses of a host, all of them allowed.

    A literal address may be private, as the user has named it; `localhost` is this machine; other names are public.

    Raises:
        ConfigError: One of them is not allowed.
        OSError: The name has no address.
    """
    found = [ip_address(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in found:
        if not _is_allowed(host, address):
            raise ConfigError(
                f"`{host}` has the address {address}, which no server of that name may have",
                where="`url`",
                hint="names must have public addresses; for a private server give its literal address, or `localhost`",
            )
    return list(dict.fromkeys(found))


def is_public(address: Address) -> bool:
    """Whether an address is one host's on the internet: not private, local, shared, reserved or a group's, nor a way to
    write one that is."""
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast
    within = _within(address)
    if within is not None and address.ipv4_mapped is None:
        return is_public(within)
    return address in UNICAST and address.is_global


def _within(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, if it does."""
    if address in TRANSLATED:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour


def _is_allowed(host: str, address: Address) -> bool:
    if host == "localhost":
        return address.is_loopback
    if _is_literal(host):
        within = _within(address) if isinstance(address, IPv6Address) else None
        if within is not None:
            return _is_allowed(host, within)
        return not (address.is_link_local or address.is_multicast or address.is_unspecified)
    return is_public(address)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _opened(server: Server, deadline: float) -> socket.socket:
    """A socket to the server; encrypted ones have yet to shake hands."""
    stream = _first(addresses(server.host, server.port), server.port, deadline)
    if server.parts.scheme == "http":
        return stream
    context = ssl.create_default_context()
    return context.wrap_socket(stream, server_hostname=server.host, do_handshake_on_connect=False)


def _first(found: Sequence[Address], port: int, deadline: float) -> socket.socket:
    """A socket to the first address that answers. A literal address is not resolved again."""
    for address in found[:-1]:
        with suppress(OSError):
            return socket.create_connection((str(address), port), _left(deadline))
    return socket.create_connection((str(found[-1]), port), _left(deadline))


def _left(deadline: float) -> float:
    """Seconds until the deadline, of which there must be some."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the time is over")
    return left


def _cut(stream: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        # The plain socket's own: an encrypted one would take leave first.
        socket.socket.shutdown(stream, socket.SHUT_RDWR)
