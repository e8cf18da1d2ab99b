"""Which network interface leads to another node. Standard library only.

    export GLOO_SOCKET_IFNAME=$(python -m dist_colorize.slurm.network OTHER_NODE)

gloo listens on the address that the node's own name has, which is 127.0.1.1 on many systems (/etc/hosts): no other
node reaches that. The route to another node gives the right address.
"""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
import sys

SIOCGIFADDR = 0x8915
"""Linux: ioctl that tells the IPv4 address of an interface."""


def address_of(host: str) -> str | None:
    """The IPv4 address that `host` has here; None where its name is unknown or means this machine only."""
    try:
        address = socket.gethostbyname(host)
    except OSError:
        return None
    return None if ipaddress.ip_address(address).is_loopback else address


def interface_towards(address: str) -> str | None:
    """The interface by which packets to an IPv4 `address` leave; None where there is no route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # UDP: sends nothing, only asks for the route
        except OSError:
            return None
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return None


def main() -> int:
    address = address_of(sys.argv[1]) or sys.argv[1]
    found = interface_towards(address)
    if found is None:
        print(f"error: no route to {sys.argv[1]}; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME", file=sys.stderr)
        return 1
    print(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
