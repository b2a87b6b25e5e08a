"""Certificates as a company has them: an authority of its own, one below it that signs, and those of servers."""

import datetime
import ipaddress
import re
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def make_certificates(folder: Path, *hosts: str) -> Path:
    """In `folder`: root.pem; ca.pem, signed by it; server.pem, of `hosts` and signed by that, with ca.pem behind it, and
    server.key."""
    folder.mkdir(parents=True, exist_ok=True)
    root_key, ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
    signs = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
    names = x509.SubjectAlternativeName([alternative(host) for host in hosts])
    root = certificate("root", root_key, "root", root_key, signs)
    ca = certificate("ca", ca_key, "root", root_key, signs)
    server = certificate("server", server_key, "ca", ca_key, names)
    key = server_key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for name, content in {
        "root.pem": root,
        "ca.pem": ca,
        "server.pem": server + ca,
        "server.key": key,
    }.items():
        (folder / name).write_bytes(content)
    return folder


def certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    extension: Any,
) -> bytes:
    """PEM, for a day; of an authority where `extension` is its use of the key."""
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    is_ca = isinstance(extension, x509.KeyUsage)
    public, issuer_public = key.public_key(), issuer_key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - day)
        .not_valid_after(now + day)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_public), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(extension, critical=is_ca)
    )
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def alternative(host: str) -> x509.GeneralName:
    if re.fullmatch(r"[\d.]+", host):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)
