"""Make the secrets of the team stack: a folder of files that compose and kustomize mount, and that is not in git.

    python deploy/make_secrets.py --mlflow-host mlflow.example.com --s3-host s3.example.com
    python deploy/make_secrets.py ... --renew-certificates    # the certificates alone, from the same authority

Passwords and keys are random. The certificates come from an authority of their own (ca.crt); put your own
tls.crt and tls.key in their place if you have them. Nothing that is there is overwritten.
"""

import argparse
import datetime
import ipaddress
import json
import secrets
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAYS = 397  # what browsers accept at most
PASSWORDS = ("db-superuser-password", "db-password", "admin-password", "session-key", "kek-passphrase")
BUCKET = "mlflow"
KUSTOMIZATION = """# Made by deploy/make_secrets.py. Each container mounts only the secrets that it needs.
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
secretGenerator:
  - name: tracking
    files: [ca.crt, db-password, admin-password, session-key, kek-passphrase, s3-credentials]
  - name: proxy
    files: [tls.crt, tls.key]
  - name: postgres
    files: [postgres.crt, postgres.key, db-password, db-superuser-password]
  - name: objects
    files: [s3-identities.json]
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python deploy/make_secrets.py", description="Make the stack's secrets."
    )
    parser.add_argument("--mlflow-host", required=True, help="name in the tracking server's address")
    parser.add_argument("--s3-host", required=True, help="name in the artifact store's address")
    parser.add_argument(
        "--db-host", default="postgres", help="name of the database in the certificate (postgres)"
    )
    parser.add_argument("--to", type=Path, default=Path(__file__).resolve().parent / "secrets")
    parser.add_argument("--renew-certificates", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.to
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not arguments.renew_certificates:
        write_passwords(folder)
        write(folder / "kustomization.yaml", KUSTOMIZATION)
    write_certificates(
        folder, [arguments.mlflow_host, arguments.s3_host], [arguments.db_host], arguments.renew_certificates
    )
    print(
        f"{folder} has the secrets. Keep a copy of it outside of this machine: without kek-passphrase and the"
    )
    print(
        "database's passwords a backup is of little use. The administrator's password is in admin-password."
    )


def write_passwords(folder: Path) -> None:
    for name in PASSWORDS:
        write(folder / name, secrets.token_urlsafe(32))
    key, secret = secrets.token_hex(10).upper(), secrets.token_urlsafe(30)
    write(
        folder / "s3-credentials", f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    # SeaweedFS's own form of the same: this key may use this bucket, and nobody anything else.
    identity = {
        "name": "mlflow",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": [f"{action}:{BUCKET}" for action in ("Read", "Write", "List", "Tagging")],
    }
    if "aws_access_key_id = " + key in (folder / "s3-credentials").read_text():
        write(folder / "s3-identities.json", json.dumps({"identities": [identity]}, indent=2) + "\n")


def write_certificates(folder: Path, public: list[str], database: list[str], renew: bool) -> None:
    """ca.crt and ca.key; tls.* for the proxy, postgres.* for the database, both signed by it."""
    if not (folder / "ca.key").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        authority = certificate("MLflow stack", key, key, None, [], days=3650)
        write(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
        write(folder / "ca.key", private(key))
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    for name, hosts in {"tls": public, "postgres": [*database, "localhost"]}.items():
        if renew:
            (folder / f"{name}.crt").unlink(missing_ok=True)
            (folder / f"{name}.key").unlink(missing_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        made = certificate(hosts[0], key, signer, authority, hosts, DAYS)
        if not (folder / f"{name}.crt").exists():
            write(folder / f"{name}.crt", made.public_bytes(serialization.Encoding.PEM))
            write(folder / f"{name}.key", private(key))


def certificate(name, key, signer, authority, hosts, days) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if authority else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(usage(authority is None), critical=True)
    )
    if hosts:
        names = [alternative(host) for host in dict.fromkeys(hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    return builder.sign(signer, hashes.SHA256())


def usage(authority: bool) -> x509.KeyUsage:
    others = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        **dict.fromkeys(others, False),
    )


def alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def private(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def write(path: Path, content: str | bytes) -> None:
    """Kept when it is there. The folder is closed to others (0700); the files are not, for Docker mounts them as they
    are into containers whose users are not this one."""
    if not path.exists():
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(0o644)


if __name__ == "__main__":
    sys.exit(main())
