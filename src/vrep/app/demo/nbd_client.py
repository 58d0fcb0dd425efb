"""A small NBD client: enough to write numbered blocks and to read a view (`--guest none`).

Fixed newstyle over a Unix socket, simple replies, one request at a time. Source: the NBD
protocol specification, "Newstyle negotiation" and "Transmission".
"""

from __future__ import annotations

import socket
import struct
import urllib.parse

from vrep.errors import ProtocolError, StorageError, UnreachableError

NBDMAGIC = 0x4E42444D41474943
IHAVEOPT = 0x49484156454F5054
REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
OPT_GO = 7
REP_ACK = 1
REP_INFO = 3
READ, WRITE, DISCONNECT, FLUSH = 0, 1, 2, 3
FUA = 1


class NbdClient:
    """One connection to ``nbd+unix:///NAME?socket=PATH``. Offsets and lengths are bytes."""

    def __init__(self, uri: str, timeout_s: float = 30.0) -> None:
        parts = urllib.parse.urlsplit(uri)
        path = urllib.parse.parse_qs(parts.query)["socket"][0]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._cookie = 0
        self.bytes = 0
        try:
            self._socket.connect(path)
            self._negotiate(urllib.parse.unquote(parts.path[1:]).encode())
        except OSError as error:
            self._socket.close()
            raise UnreachableError(f"{uri}: {error}") from None
        except BaseException:
            self._socket.close()
            raise

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            more = self._socket.recv(count - len(data))
            if not more:
                raise UnreachableError("the NBD server closed the connection")
            data += more
        return bytes(data)

    def _negotiate(self, name: bytes) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self._receive(18))
        if magic != NBDMAGIC or option_magic != IHAVEOPT:
            raise ProtocolError("not an NBD server")
        self._socket.sendall(struct.pack(">I", flags & 3))
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">QII", IHAVEOPT, OPT_GO, len(body)) + body)
        while True:
            magic, _option, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != REPLY_MAGIC or length > 1 << 16:
                raise ProtocolError("a malformed NBD option reply")
            payload = self._receive(length)
            if kind == REP_INFO and payload[:2] == b"\0\0":
                self.bytes = int(struct.unpack(">HQH", payload)[1])
            elif kind == REP_ACK:
                return
            elif kind != REP_INFO:
                raise ProtocolError(f"the NBD server refuses the export: {payload.decode()}")

    def _request(self, kind: int, offset: int, length: int, data: bytes, flags: int) -> bytes:
        self._cookie += 1
        header = struct.pack(">IHHQQI", REQUEST_MAGIC, flags, kind, self._cookie, offset, length)
        self._socket.sendall(header + data)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != SIMPLE_MAGIC or cookie != self._cookie:
            raise ProtocolError("an NBD reply to another request")
        if error:
            raise StorageError(f"NBD error {error} at offset {offset}")
        return self._receive(length) if kind == READ else b""

    def read(self, offset: int, length: int) -> bytes:
        return self._request(READ, offset, length, b"", 0)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self._request(WRITE, offset, len(data), data, FUA if fua else 0)

    def flush(self) -> None:
        self._request(FLUSH, 0, 0, b"", 0)

    def close(self) -> None:
        try:
            self._socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        except OSError:
            return  # the server is gone: there is nobody to take leave of
        finally:
            self._socket.close()

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


__all__ = ["NbdClient"]
