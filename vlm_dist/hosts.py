"""Which requests a page on this machine answers: those that name the host it listens on. A page of the web whose name was made to lead
here (DNS rebinding) names its own, and would else read what is shown."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable

HEADER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@\s]+)(?::\d{1,5})?")
REFUSED = "this page answers only where it was opened; use the address that its command printed"


def host_check(bound: str) -> Callable[[str], bool]:
    """A function of a request's Host header: whether it names the host that a server was bound to. The port does not count, because
    tunnels change it."""
    every = bound in ("", "0.0.0.0", "::")
    names = {bound.lower()}
    addresses = set() if every else {str(found[4][0]) for found in _looked_up(bound)}
    if every or any(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in addresses):
        names.add("localhost")
    if every:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    def is_ours(header: str) -> bool:
        found = HEADER.fullmatch(header)
        if found is None:
            return False
        name = found[1].strip("[]").lower().rstrip(".")
        try:
            ip = ipaddress.ip_address(name)
        except ValueError:
            return name in names
        return every or str(ip) in addresses or ("localhost" in names and ip.is_loopback)

    return is_ours


def _looked_up(host: str) -> list:
    try:
        return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:  # listening there will fail too, and is told
        return []
