"""A CA and two certificates that it signs, for `unionfs daemon --tlsverify` and its client.

EC keys (P-256). The CA's key signs these two and is then forgotten: nobody can steal it, and another client means a new
set. Names are those of Docker's documentation, so `UNIONFS_CERT_PATH` (and curl's options) need no explanation.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from unionfs.errors import EXIT_USAGE, MountError

FILES = ("ca.pem", "server-cert.pem", "server-key.pem", "cert.pem", "key.pem")
_CLOCK_SKEW = datetime.timedelta(minutes=10)


def create(directory: str, hosts: Sequence[str], days: int, force: bool) -> list[str]:
    """Writes the five files and returns their paths; `hosts` (names or addresses) go into subjectAltName.

    MountError if one of the files is there already and `force` is not set: nothing is written then.
    """
    there = [name for name in FILES if os.path.lexists(os.path.join(directory, name))]
    if there and not force:
        raise MountError(
            f"certs: {directory} has {', '.join(there)} already: choose another directory, or replace them with --force"
        )
    content = _make(hosts or default_hosts(), days)
    try:
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in FILES:
            _write(os.path.join(directory, name), content[name], 0o600 if "key" in name else 0o644)
    except OSError as error:
        raise MountError(f"certs: {error.filename or directory}: {error.strerror}") from None
    return [os.path.join(directory, name) for name in FILES]


def default_hosts() -> list[str]:
    return list(dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname()]))


def _make(hosts: Sequence[str], days: int) -> dict[str, bytes]:
    ca_key, server_key, client_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    ca_name = _name("unionfs CA")
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )

    def signed(
        name: str, key: ec.EllipticCurvePrivateKey, purpose: x509.ObjectIdentifier, names: Sequence[str]
    ) -> x509.Certificate:
        builder = (
            _builder(_name(name), ca_name, key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_alternative(one) for one in names]), critical=False
            )
        return builder.sign(ca_key, hashes.SHA256())

    server = signed("unionfs daemon", server_key, ExtendedKeyUsageOID.SERVER_AUTH, hosts)
    client = signed("unionfs client", client_key, ExtendedKeyUsageOID.CLIENT_AUTH, ())
    return {
        "ca.pem": ca.public_bytes(serialization.Encoding.PEM),
        "server-cert.pem": server.public_bytes(serialization.Encoding.PEM),
        "server-key.pem": _private(server_key),
        "cert.pem": client.public_bytes(serialization.Encoding.PEM),
        "key.pem": _private(client_key),
    }


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    try:
        end = now + datetime.timedelta(days=days)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_SKEW)
            .not_valid_after(end)
        )
    except (OverflowError, ValueError):
        raise MountError(f"certs: --days {days}: no such date", EXIT_USAGE) from None


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host)
    except ValueError:
        raise MountError(f"certs: --host {host!r}: neither an address nor a name of a host", EXIT_USAGE) from None


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: str, content: bytes, mode: int) -> None:
    """Under a new name first: a daemon that reads meanwhile sees the old file or the new one."""
    temporary = f"{path}.new"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with open(fd, "wb") as stream:
        os.fchmod(fd, mode)
        stream.write(content)
    os.rename(temporary, path)
