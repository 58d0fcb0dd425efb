"""A small iSCSI initiator: login without CHAP, one command at a time, error recovery level 0.

Source: RFC 7143 (PDUs: section 11), SPC-4 and SBC-3 (CDBs). Real initiators are in
test_iscsi.py; this one says exactly what it sent, and hides no error: a connection that ends is
`UnreachableError`, and what was not answered then may have happened or not.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import urllib.parse

from fronts import BlockClient

from vrep.errors import ProtocolError, StorageError, UnreachableError

MIB = 1 << 20
BHS_BYTES = 48
IMMEDIATE, FINAL = 0x40, 0x80
NOP_OUT, COMMAND, LOGIN, DATA_OUT, LOGOUT = 0x00, 0x01, 0x03, 0x05, 0x06
NOP_IN, RESPONSE, LOGIN_RESPONSE, DATA_IN, LOGOUT_RESPONSE, R2T = 0x20, 0x21, 0x23, 0x25, 0x26, 0x31
ASYNCHRONOUS = 0x32
NO_TAG = 0xFFFFFFFF
GOOD, CHECK_CONDITION, BUSY, TASK_SET_FULL = 0x00, 0x02, 0x08, 0x28
UNIT_ATTENTION = 6
SEND_MAX = 65536
"""of data in one PDU"""
WRITE_MAX = 16 * MIB
TRIES = 1000


def sense_key(sense: bytes) -> int:
    """Of fixed or descriptor sense (SPC-4, 4.5)."""
    return sense[2 if sense[0] & 0x7E == 0x70 else 1] & 0xF if len(sense) > 2 else 0


class IscsiClient(BlockClient):
    """One session with ``iscsi://HOST:PORT/TARGET/LUN``, of an initiator that is new each time."""

    most = WRITE_MAX

    def __init__(self, uri: str, timeout_s: float = 60.0) -> None:
        parts = urllib.parse.urlsplit(uri)
        self._target, _, lun = parts.path[1:].rpartition("/")
        self._lun = struct.pack(">HHI", int(lun), 0, 0)
        self._tag, self._command_number, self._expected = 0, 1, 0
        self._isid = b"\x80" + os.urandom(5)
        try:
            self._socket = socket.create_connection((parts.hostname, parts.port), timeout_s)
        except OSError as error:
            raise UnreachableError(f"{uri}: {error}") from None
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._login()
            capacity = self._do(struct.pack(">BBQIBB", 0x9E, 0x10, 0, 32, 0, 0), 32)
            last, self.block = struct.unpack_from(">QI", capacity)
            self.bytes = (last + 1) * self.block
        except BaseException:
            self._socket.close()
            raise

    # ---- PDUs ------------------------------------------------------------------------

    def _receive(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            try:
                more = self._socket.recv(count - len(data))
            except OSError as error:
                raise UnreachableError(f"the iSCSI target: {error}") from None
            if not more:
                raise UnreachableError("the iSCSI target closed the connection")
            data += more
        return bytes(data)

    def _send(self, opcode: int, flags: int, rest: bytes, data: bytes = b"") -> None:
        """A PDU: its header from byte 8 on is `rest`."""
        header = struct.pack(">BBHI", opcode, flags, 0, len(data)) + rest
        assert len(header) == BHS_BYTES
        try:
            self._socket.sendall(header + data + bytes(-len(data) % 4))
        except OSError as error:
            raise UnreachableError(f"the iSCSI target: {error}") from None

    def _next(self) -> tuple[int, bytes, bytes]:
        """Opcode, header and data of the next PDU that is no ping."""
        while True:
            header = self._receive(BHS_BYTES)
            length = int.from_bytes(header[5:8], "big")
            data = self._receive(length + -length % 4)[:length]
            opcode = header[0] & 0x3F
            _tag, transfer, status_number = struct.unpack_from(">III", header, 16)
            if opcode in (RESPONSE, LOGIN_RESPONSE, LOGOUT_RESPONSE) or (
                opcode == DATA_IN and header[1] & 1
            ):
                self._expected = (status_number + 1) & NO_TAG
            if opcode == ASYNCHRONOUS:
                raise UnreachableError("the iSCSI target takes its leave")
            if opcode != NOP_IN:
                return opcode, header, data
            if transfer != NO_TAG:
                numbers = (NO_TAG, transfer, self._command_number, self._expected, 0, 0, 0)
                pinged = header[8:16] + struct.pack(">IIIIIII", *numbers) + bytes(4)
                self._send(NOP_OUT | IMMEDIATE, FINAL, pinged)

    # ---- sessions ----------------------------------------------------------------------

    def _login(self) -> None:
        keys = {
            "InitiatorName": f"iqn.2026-01.invalid.test:{self._isid.hex()}",
            "SessionType": "Normal",
            "TargetName": self._target,
            "HeaderDigest": "None",
            "DataDigest": "None",
            "InitialR2T": "Yes",
            "ImmediateData": "Yes",
            "MaxRecvDataSegmentLength": "262144",
            "MaxBurstLength": "1048576",
            "FirstBurstLength": str(SEND_MAX),
            "ErrorRecoveryLevel": "0",
        }
        text = "".join(f"{key}={value}\0" for key, value in keys.items()).encode()
        rest = self._isid + struct.pack(">HIHHII", 0, 0, 0, 0, self._command_number, 0) + bytes(16)
        # Operational negotiation, then full feature phase.
        self._send(LOGIN | IMMEDIATE, FINAL | 1 << 2 | 3, rest, text)
        opcode, header, data = self._next()
        if opcode != LOGIN_RESPONSE or header[36:38] != b"\0\0" or not header[1] & FINAL:
            raise ProtocolError(f"the login is refused: {header.hex()} {data!r}")
        answers = dict(pair.partition("=")[::2] for pair in data.decode().split("\0") if pair)
        self._immediate = answers.get("ImmediateData", "Yes") == "Yes"
        self._segment = min(SEND_MAX, int(answers.get("MaxRecvDataSegmentLength", "8192")))

    def close(self) -> None:
        try:
            numbers = struct.pack(
                ">IHHII", self._tag + 1, 0, 0, self._command_number, self._expected
            )
            self._send(LOGOUT | IMMEDIATE, FINAL, bytes(8) + numbers + bytes(16))
            self._next()
        except UnreachableError:
            return  # the target is gone: there is nobody to take leave of
        finally:
            self._socket.close()

    # ---- commands -------------------------------------------------------------------------

    def _do(self, cdb: bytes, expect: int = 0, data: bytes = b"") -> bytes:
        """A command to its end. What a unit says before it did anything (an attention, that it is
        full) is heard, and the command given again."""
        for _ in range(TRIES):
            status, sense, found = self._once(cdb, expect, data)
            if status == GOOD:
                return found
            attention = status == CHECK_CONDITION and sense_key(sense) == UNIT_ATTENTION
            if attention:
                continue
            if status in (BUSY, TASK_SET_FULL):
                time.sleep(0.005)
                continue
            raise StorageError(f"SCSI status {status:#x} of {cdb.hex()}, sense {sense.hex()}")
        raise StorageError(f"{cdb.hex()} finds no room")

    def _once(self, cdb: bytes, expect: int, data: bytes) -> tuple[int, bytes, bytes]:
        self._tag += 1
        now = data[: self._segment] if self._immediate else b""
        flags = FINAL | 1 | (0x40 if expect else 0) | (0x20 if data else 0)
        numbers = (self._tag, expect or len(data), self._command_number, self._expected)
        rest = self._lun + struct.pack(">IIII", *numbers) + cdb.ljust(16, b"\0")
        self._send(COMMAND, flags, rest, now)
        self._command_number = (self._command_number + 1) & NO_TAG
        found = bytearray(expect)
        while True:
            opcode, header, body = self._next()
            if struct.unpack_from(">I", header, 16)[0] != self._tag:
                raise ProtocolError(f"an answer to another task: {header.hex()}")
            if opcode == R2T:
                self._burst(header, data)
            elif opcode == DATA_IN:
                at = struct.unpack_from(">I", header, 40)[0]
                found[at : at + len(body)] = body
                if header[1] & 1:
                    return header[3], b"", bytes(found)
            elif opcode == RESPONSE and header[2] == 0:
                return header[3], body[2:], bytes(found)
            else:
                raise ProtocolError(f"an answer that is none: {header.hex()}")

    def _burst(self, header: bytes, data: bytes) -> None:
        """What an R2T asks for."""
        (transfer,) = struct.unpack_from(">I", header, 20)
        offset, length = struct.unpack_from(">II", header, 40)
        for number, at in enumerate(range(offset, offset + length, self._segment)):
            part = data[at : min(at + self._segment, offset + length)]
            last = FINAL if at + len(part) == offset + length else 0
            tags = struct.pack(">IIII", self._tag, transfer, 0, self._expected)
            place = struct.pack(">IIII", 0, number, at, 0)
            self._send(DATA_OUT, last, self._lun + tags + place, part)

    # ---- a disk ------------------------------------------------------------------------------

    def _range(self, opcode: int, flags: int, offset: int, length: int) -> bytes:
        blocks = offset // self.block, length // self.block
        return struct.pack(">BBQIBB", opcode, flags, *blocks, 0, 0)

    def read_blocks(self, offset: int, length: int) -> bytes:
        return self._do(self._range(0x88, 0, offset, length), length)

    def write_blocks(self, offset: int, data: bytes, fua: bool) -> None:
        self._do(self._range(0x8A, 8 if fua else 0, offset, len(data)), data=data)

    def zero_blocks(self, offset: int, length: int, *, hole: bool) -> None:
        # NDOB: zeroes, without a block that says so; UNMAP where it may be a hole.
        self._do(self._range(0x93, 1 | (8 if hole else 0), offset, length))

    def trim_blocks(self, offset: int, length: int) -> None:
        blocks = offset // self.block, length // self.block
        listed = struct.pack(">HHI", 22, 16, 0) + struct.pack(">QII", *blocks, 0)
        self._do(struct.pack(">BBIBHB", 0x42, 0, 0, 0, len(listed), 0), data=listed)

    def flush(self) -> None:
        self._do(self._range(0x91, 0, 0, 0))
