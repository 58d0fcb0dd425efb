"""What this machine can do at most: one stage alone, and the least work of all of them.

In MB/s, the bounds of steady shipping: AES-256-GCM of 64 KiB pieces through libcrypto; TLS 1.3
over loopback between two processes; appending with an fdatasync for each 4 MiB, as a journal
under load does it.

In µs of CPU: what each step of a replicated 4 KiB write costs alone in C (`pipeline_limit.c`),
and what the client costs against a server that does nothing (`null_nbd.c`). Their sum, on all
processors, is the rate that no replication on this machine can pass.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).resolve().parents[2]
PIECE = 64 << 10
AMOUNT = 256 << 20
SYNC_EVERY = 4 << 20
# A limit is a limit only with the cipher that ours has.
NATIVE = ROOT / "src" / "_native"
OUR_GCM = (f"-I{NATIVE}", str(NATIVE / "crypto" / "gcm.c"), "-lpthread")
IPSEC_MB = Path("/usr/include/intel-ipsec-mb.h")
OUR_MB = ("-DVREP_IPSEC_MB", "-lIPSec_MB")


def sealing() -> float:
    cipher, data = AESGCM(bytes(32)), os.urandom(PIECE)
    begin = time.monotonic()
    for number in range(AMOUNT // PIECE):
        cipher.encrypt(number.to_bytes(12), data, None)
    return AMOUNT / (time.monotonic() - begin) / 1e6


def certificate(where: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    where.write_bytes(key.private_bytes(pem, pkcs8, plain) + made.public_bytes(pem))


def tls(directory: Path) -> float:
    pem = directory / "limit.pem"
    certificate(pem)
    listener = socket.create_server(("127.0.0.1", 0))
    child = os.fork()
    if child == 0:
        # The receiving end: reads all, says so with one byte, and is gone.
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            with context.wrap_socket(listener.accept()[0], server_side=True) as peer:
                room, left = memoryview(bytearray(256 << 10)), AMOUNT
                while left:
                    left -= peer.recv_into(room[: min(left, len(room))])
                peer.sendall(b"x")
        finally:
            os._exit(0)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    data = os.urandom(256 << 10)
    with context.wrap_socket(socket.create_connection(listener.getsockname())) as mine:
        begin = time.monotonic()
        for _ in range(AMOUNT // len(data)):
            mine.sendall(data)
        mine.recv(1)
        spent = time.monotonic() - begin
    os.waitpid(child, 0)
    listener.close()
    return AMOUNT / spent / 1e6


def disk(directory: Path) -> float:
    data, path = os.urandom(1 << 20), directory / "limit.bin"
    with path.open("wb", buffering=0) as file:
        begin = time.monotonic()
        for at in range(0, AMOUNT, len(data)):
            file.write(data)
            if (at + len(data)) % SYNC_EVERY == 0:
                os.fdatasync(file.fileno())
        spent = time.monotonic() - begin
    path.unlink()
    return AMOUNT / spent / 1e6


def program(name: str, directory: Path, *libraries: str) -> Path:
    """One of bench/micro, compiled."""
    made = directory / name
    source = ROOT / "bench" / "micro" / f"{name}.c"
    if "-lcrypto" in libraries:
        libraries = (*OUR_GCM, *(OUR_MB if IPSEC_MB.exists() else ()), *libraries)
    subprocess.run(["gcc", "-O2", source, *libraries, "-o", made], check=True)
    return made


def steps_us(directory: Path) -> dict[str, float]:
    """CPU of each step of a replicated 4 KiB write, and their sum."""
    done = subprocess.run(
        [program("pipeline_limit", directory, "-lcrypto"), directory],
        check=True,
        capture_output=True,
    )
    return {name: float(value) for name, value in json.loads(done.stdout).items()}


def writes_per_s(
    client_us: float, steps: dict[str, float], disk_mb_s: float, write_bytes: int
) -> float:
    """At most so many replicated 4 KiB writes, each of which the target stores as `write_bytes`."""
    processors = len(os.sched_getaffinity(0))
    return min(processors * 1e6 / (client_us + steps["sum"]), disk_mb_s * 1e6 / write_bytes)


def measure(directory: Path) -> dict[str, float]:
    return {"AES-GCM": sealing(), "TLS": tls(directory), "disk": disk(directory)}
