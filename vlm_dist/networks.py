"""Which network of this machine leads to the other ranks, where its own name leads nowhere but to itself (127.0.1.1, as Debian writes it):
gloo would take that address, and no rank on another machine reaches it."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

CHOSEN_BY = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915
DISCARD = 9  # a port for a way that nothing is sent on


def is_inside(address: str) -> bool:
    """Whether an address is one that only this machine reaches, or none."""
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def machine() -> str:
    """What tells this machine, or this container on it, from others; names alone do not: some are all called localhost."""
    try:
        boot, network = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")
    except OSError:
        boot = network = ""
    return f"{socket.gethostname()} {boot} {network}"


def own_address() -> str:
    """What this machine's own name leads to; empty: nowhere."""
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""


def address_towards(host: str) -> str:
    """This machine's own address on the way to another; empty: there is no way. Nothing is sent."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, DISCARD, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(where)
            return probe.getsockname()[0]
    except OSError:
        return ""


def interface_of(address: str) -> str | None:
    """The name of the interface that has this IPv4 address; None: none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None


def choose(*ways: str) -> str | None:
    """Let gloo take the interface that leads to the first of these hosts that is another machine, unless the user has named one, or this
    machine's name is good for others; returns what is to be told of it."""
    own = own_address()
    if os.environ.get(CHOSEN_BY) or not is_inside(own):
        return None
    for address in map(address_towards, ways):
        if not is_inside(address) and (name := interface_of(address)) is not None:
            os.environ[CHOSEN_BY] = name
            found = f"{socket.gethostname()} is {own or 'unknown'} by its own name, which no other node reaches"
            return f"{found}: ranks meet over {name} ({address}); {CHOSEN_BY}=... says otherwise"
    return None
