"""Back up the stack's two memories, the database and the bucket, into a folder, and restore them.

    python backup.py backup /backup [--keep 14]    # the newest 14 stay
    python backup.py list /backup
    python backup.py verify /backup [NAME]         # every byte against its sha256; the newest when NAME is not given
    python backup.py restore /backup [NAME]        # into an empty database

    /backup/2026-01-31T03-00-00Z/database.dump, manifest.json      one folder a backup
    /backup/objects/ab/abcd…                                       each artifact once, named by its sha256

The database goes first: an artifact that is uploaded meanwhile is only too much, never missing. Reads the same
environment as server.py. Who can read the folder can read everything: keep it encrypted and elsewhere.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import server

CHUNK = 2**20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python backup.py", description="Back up and restore database and bucket."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("backup", "list", "verify", "restore"):
        command = commands.add_parser(name)
        command.add_argument("root", type=Path)
        if name == "backup":
            command.add_argument("--keep", type=int, help="delete all but so many")
        if name in ("verify", "restore"):
            command.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    root: Path = arguments.root
    if arguments.command == "list":
        print("\n".join(names(root)) or f"{root} has no backup.")
    elif arguments.command == "backup":
        if arguments.keep is not None and arguments.keep < 1:
            sys.exit("error: --keep must be at least 1.")
        read_settings()
        print(backup(root))
        if arguments.keep:
            prune(root, arguments.keep)
    else:
        name = arguments.name or (names(root) or [sys.exit(f"error: {root} has no backup.")])[-1]
        manifest = verified(root, name)
        print(f"{name}: {len(manifest['objects'])} artifacts and the database are whole.")
        if arguments.command == "restore":
            read_settings()
            restore(root, name, manifest)


def read_settings() -> None:
    password, problem = server.read_secret("DB_PASSWORD")
    missing = [name for name in ("DB_HOST", "S3_BUCKET") if not os.environ.get(name)]
    if problem or missing:
        sys.exit(f"error: {problem or ', '.join(missing) + ' not set'}.")
    os.environ["PGPASSWORD"] = password


def database() -> str:
    return server.database_uri().replace("+psycopg2", "", 1)


def names(root: Path) -> list[str]:
    """Whole backups, the oldest first; one that was interrupted has no manifest."""
    return sorted(path.parent.name for path in root.glob("*/manifest.json"))


def backup(root: Path) -> str:
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    before = read_manifest(root, names(root)[-1])["objects"] if names(root) else {}
    folder = root / name
    folder.mkdir(parents=True)
    dump = folder / "database.dump"
    run(["pg_dump", "--format=custom", "--no-owner", "--no-privileges", f"--file={dump}", database()])
    manifest: dict[str, Any] = {"database": sha256(dump), "objects": {}}
    client, bucket = server.s3_client(), os.environ["S3_BUCKET"]
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for entry in page.get("Contents", []):
            key, known = entry["Key"], before.get(entry["Key"])
            same = known and (known["etag"], known["size"]) == (entry["ETag"], entry["Size"])
            if same and stored(root, known["sha256"]).exists():
                manifest["objects"][key] = known
            else:
                digest, size = fetch(client, bucket, key, root)
                manifest["objects"][key] = {"sha256": digest, "size": size, "etag": entry["ETag"]}
    fresh = folder / "manifest.json.part"
    fresh.write_text(json.dumps(manifest, indent=1))
    fresh.rename(folder / "manifest.json")
    return name


def fetch(client: Any, bucket: str, key: str, root: Path) -> tuple[str, int]:
    """Put the object into root/objects; its sha256 and size."""
    part = root / "objects" / f".{os.getpid()}.part"
    part.parent.mkdir(exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with open(part, "wb") as file:
        for chunk in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(CHUNK):
            digest.update(chunk)
            size += file.write(chunk)
    target = stored(root, digest.hexdigest())
    target.parent.mkdir(exist_ok=True)
    part.rename(target)
    return digest.hexdigest(), size


def stored(root: Path, digest: str) -> Path:
    return root / "objects" / digest[:2] / digest


def read_manifest(root: Path, name: str) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((root / name / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: {root / name} is not a whole backup ({type(error).__name__}). There are: {', '.join(names(root))}."
        )
    return manifest


def verified(root: Path, name: str) -> dict[str, Any]:
    """The manifest. Ends the process, naming what is missing or not as it was, before anything is touched."""
    manifest = read_manifest(root, name)
    bad = [] if is_whole(root / name / "database.dump", manifest["database"]) else ["database.dump"]
    bad += [
        key
        for key, each in manifest["objects"].items()
        if not is_whole(stored(root, each["sha256"]), each["sha256"])
    ]
    if bad:
        sys.exit(f"error: {name} is damaged; missing or changed: {', '.join(bad[:10])} ({len(bad)} in all).")
    return manifest


def is_whole(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def restore(root: Path, name: str, manifest: dict[str, Any]) -> None:
    """All of the database or nothing, then the artifacts. Ends the process when the database is not empty."""
    import psycopg2

    connection = psycopg2.connect(database())
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'")
        tables = cursor.fetchone()[0]
    connection.close()
    if tables:
        sys.exit(
            f"error: the database has {tables} tables; restore goes into an empty one (docs/stack.md says how)."
        )
    client, bucket = server.s3_client(), os.environ["S3_BUCKET"]
    server.make_bucket(bucket)
    for key, each in manifest["objects"].items():  # first: no run may point to what is not there yet
        client.upload_file(str(stored(root, each["sha256"])), bucket, key)
    run(
        [
            "pg_restore",
            "--no-owner",
            "--no-privileges",
            "--exit-on-error",
            "--single-transaction",
            f"--dbname={database()}",
        ]
        + [str(root / name / "database.dump")]
    )
    print(f"{name} is restored: database and {len(manifest['objects'])} artifacts.")


def prune(root: Path, keep: int) -> None:
    for name in names(root)[:-keep]:
        shutil.rmtree(root / name)
    used = {each["sha256"] for name in names(root) for each in read_manifest(root, name)["objects"].values()}
    for path in root.glob("objects/*/*"):
        if path.name not in used:
            path.unlink()


def run(command: list[str]) -> None:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"error: {command[0]} failed:\n{done.stderr.strip()}")


if __name__ == "__main__":
    main()
