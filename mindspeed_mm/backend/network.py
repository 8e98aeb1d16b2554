"""Which network interface leads to the other hosts."""

from __future__ import annotations

import fcntl
import socket
import struct

_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux


def interface_towards(host: str) -> str | None:
    """Name of the interface through which this machine reaches ``host``; None where that cannot be told.

    Gloo takes the interface of the machine's own name, which is the loopback device on many machines: the others could
    not reach it there.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing, but chooses the way
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    answer = fcntl.ioctl(probe.fileno(), _ADDRESS_OF_INTERFACE, request)
                except OSError:  # an interface without an address
                    continue
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    except OSError:
        pass
    return None
