"""Which addresses a server may lead to: those of pictures and of shards alike."""

from __future__ import annotations

import ipaddress
import urllib.parse

SENDS_ON = {
    "huggingface.co": ("hf.co",),
    "github.com": ("githubusercontent.com",),
}  # sites -> those that their files really lie on
PORTS = {"http": 80, "https": 443}


def is_inside(peer: str) -> bool:
    """Whether an IP address lies inside a network: this machine, private, link-local (where clouds keep credentials), or multicast."""
    ip = ipaddress.ip_address(peer.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None) or ip
    return not ip.is_global or ip.is_multicast


def redirect_problem(source: str, target: str) -> str:
    """Why a server's redirect must not be followed; empty: it may. It may lead to the same host (also from http to https), and over https
    to another host of the same site, or of one that `SENDS_ON` knows; that host's addresses are looked at when they are known."""
    here, there = urllib.parse.urlsplit(source), urllib.parse.urlsplit(target)
    if there.scheme not in PORTS or not there.hostname:
        return "that is no http(s) address"
    if here.scheme == "https" and there.scheme == "http":
        return "that is not encrypted"
    if here.hostname == there.hostname:
        ports = [parts.port or PORTS[parts.scheme] for parts in (here, there)]
        return "" if ports[0] == ports[1] or ports == [80, 443] else "that is another port"
    if _is_ip(there.hostname) and is_inside(there.hostname):
        return "that is inside a network"
    site = _site(here.hostname or "")
    if there.scheme == "https" and not _is_ip(there.hostname) and _site(there.hostname) in (site, *SENDS_ON.get(site, ())):
        return ""
    return "that is another host"


def shown(address: str) -> str:
    """An address without what may be secret in it: a password, and the values of its query."""
    parts = urllib.parse.urlsplit(address)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"


def _site(host: str) -> str:
    """The last two parts of a name; an IP address as it is."""
    return host if _is_ip(host) else ".".join(host.lower().rstrip(".").split(".")[-2:])


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
