"""UDP sockets for the driver: bound, non-blocking, with a receive buffer of a chosen size; and clear errors if the system refuses one."""

from __future__ import annotations

import contextlib
import errno
import re
import resource
import socket

from sllm.protocol.errors import UsageError
from sllm.protocol.messages import Address

_ZONE = re.compile(r"[A-Za-z0-9_.:-]{1,15}")  # the name or number of an interface
SO_RCVBUFFORCE = 33  # Linux: a receive buffer beyond net.core.rmem_max, with CAP_NET_ADMIN


def literal_address(host: str, family: int) -> str | None:
    """`host` as a literal address that a socket of `family` can send to; None if it is a name or belongs to the other family. An IPv6 socket
    reaches IPv4 addresses in their mapped form."""
    try:
        socket.inet_pton(socket.AF_INET, host)
    except (OSError, ValueError):
        if family == socket.AF_INET6 and ":" in host:
            address, percent, zone = host.partition("%")
            with contextlib.suppress(OSError, ValueError):
                socket.inet_pton(socket.AF_INET6, address)
                return host if not percent or _ZONE.fullmatch(zone) else None
        return None
    return host if family == socket.AF_INET else f"::ffff:{host}"


def local_address(towards: Address) -> str:
    """This machine's address as the literal address `towards` would see it without address translation; "" if there is none that others could use. Sends
    nothing and does not block."""
    host, port = towards
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if literal_address(host, family) is None:
        return ""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, port or 1))
            found: str = probe.getsockname()[0]
    except (OSError, OverflowError):
        return ""
    return "" if "%" in found else found.removeprefix("::ffff:")  # an address with a zone is valid on this machine only


def bound_socket(bind: Address, receive_buffer_bytes: int = 0, setting: str = "") -> socket.socket:
    """A non-blocking UDP socket on `bind`. `receive_buffer_bytes` 0: the system's default. UsageError names address, port and `setting`."""
    host, port = bind
    where = f"{host}:{port}" + (f" ({setting})" if setting else "")
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise UsageError(f"no file descriptor left for a socket on {where}: raise the limit (ulimit -n)") from None
        raise UsageError(f"cannot open a UDP socket on {where}: {error.strerror}") from None
    try:
        sock.setblocking(False)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if receive_buffer_bytes:
            set_receive_buffer(sock, receive_buffer_bytes)
        sock.bind(bind)
    except OSError as error:
        sock.close()
        raise UsageError(f"cannot listen on {where}: {bind_problem(error)}") from None
    return sock


def bind_problem(error: OSError) -> str:
    """Why an address cannot be listened on, in a few words."""
    if isinstance(error, socket.gaierror):
        return "not an address of this machine"
    known = {errno.EADDRINUSE: "the port is in use", errno.EADDRNOTAVAIL: "not an address of this machine", errno.EACCES: "not permitted"}
    return known.get(error.errno or 0, (error.strerror or str(error)).lower())


def set_receive_buffer(sock: socket.socket, wanted_bytes: int) -> int:
    """Ask for a receive buffer, beyond net.core.rmem_max where that is permitted. Returns the effective size, in the kernel's counting: it
    doubles what was asked for, and charges each datagram with its own bookkeeping."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, wanted_bytes)
    except OSError:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, wanted_bytes)
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def ensure_descriptors(needed: int, *, what: str = "") -> None:
    """Raise the limit of open files to `needed` and some for the rest of the process, or UsageError says what is missing. `what` names the
    cause."""
    wanted = needed + 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return
        except (OSError, ValueError):
            cause = f"{what}: " if what else ""
            raise UsageError(f"{cause}needs {wanted} open files and only {hard} are allowed; raise the limit (ulimit -Hn {wanted})") from None
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
