"""The network interface that gloo is to use where this machine's name does not tell. No torch."""

import fcntl
import ipaddress
import os
import socket
import struct
import sys

VARIABLE = "GLOO_SOCKET_IFNAME"
ELSEWHERE = "192.0.2.1"  # of no machine (RFC 5737); nothing is sent to it
SIOCGIFADDR = 0x8915


def choose(host: str, port: int, *, quiet: bool = False) -> None:
    """Name the interface of the route to host:port, where ranks meet, unless the user has named one.

    gloo takes the address of this machine's name, which on Debian is 127.0.1.1 and leads nowhere.
    """
    if VARIABLE in os.environ or _is_loopback(host) or not _is_loopback(socket.gethostname()):
        return
    found = of(_source(host, port)) or of(_source(ELSEWHERE, port))
    if found is None or found == "lo":
        return
    os.environ[VARIABLE] = found
    if not quiet:
        name = f"the name of this machine, {socket.gethostname()}, is a loopback address"
        sys.stderr.write(f"{name}: ranks talk over {found}, which leads to {host}; {VARIABLE} names another\n")


def _is_loopback(name: str) -> bool:
    """True for a name, or an address, that others cannot reach; also for one that is not known."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(name)).is_loopback
    except (OSError, ValueError):
        return True


def _source(host: str, port: int) -> str | None:
    """The address from which this machine would send to host:port."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.connect((host, port))
            return str(asking.getsockname()[0])
    except OSError:
        return None


def of(address: str | None) -> str | None:
    """The interface that has an IPv4 address; None if there is none."""
    for _, name in socket.if_nameindex() if address else []:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            try:
                found = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # without an address
                continue
        if socket.inet_ntoa(found[20:24]) == address:
            return name
    return None
