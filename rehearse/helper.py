"""What the runner does around a job's script, as root and with umask 0: the checkout, archives out and in.

Given to a container's Python as text, so it imports nothing of this project. Settings come as JSON in the one
argument, a zip on standard input, and go there on standard output. As shells/abstract.go and saracen/fastzip do it.
"""

import glob
import io
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

UNIX_OWNER = 0x7875  # Info-ZIP's extra field for uid and gid


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, stdout=sys.stderr)


def sources(
    folder: Path, strategy: str, url: str, token: str, refspecs: list[str], depth: int, sha: str
) -> None:
    """A detached checkout of `sha`. Only here git trusts the folder; the job's token lies beside it, not in it."""
    beside = Path(f"{folder}.tmp")
    beside.mkdir(parents=True, exist_ok=True)
    folder.parents[1].chmod(0o777)  # of /builds, as `cache-init`
    if strategy in ("none", "empty"):
        folder.mkdir(parents=True, exist_ok=True)
        return
    if strategy == "clone":
        shutil.rmtree(folder, ignore_errors=True)
    credentials = beside / ".gitlab-runner.ext.conf"
    git("config", "--global", "--add", "safe.directory", str(folder))
    address = url.replace("://", f"://gitlab-ci-token:{token}@", 1)
    git("config", "--file", str(credentials), f"url.{address}.insteadOf", url)
    git("init", "--quiet", "--initial-branch=none", str(folder))
    os.chdir(folder)
    git("config", "include.path", str(credentials))
    git("remote", "add", "origin", url)
    shallow = ["--depth", str(depth)] if depth else []
    git("fetch", "--quiet", "--prune", "--no-recurse-submodules", "origin", *refspecs, *shallow)
    git("-c", "submodule.recurse=false", "checkout", "-f", "-q", sha)


def archive(folder: Path, paths: list[str]) -> None:
    """A zip of what is there, with modes and owners; nothing at all where there is nothing."""
    os.chdir(folder)
    found: set[str] = set()
    for pattern in paths:
        for name in glob.glob(pattern.rstrip("/"), recursive=True, include_hidden=True):
            found.add(name)
            if os.path.isdir(name):
                below = glob.glob(f"{glob.escape(name)}/**", recursive=True, include_hidden=True)
                found |= {path.rstrip("/") for path in below}
        if not glob.glob(pattern.rstrip("/"), recursive=True, include_hidden=True):
            print(f"WARNING: {pattern}: no matching files", file=sys.stderr)
    if not found:
        return
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as written:
        for name in sorted(found):
            about = os.lstat(name)
            info = zipfile.ZipInfo(f"{name}/" if stat.S_ISDIR(about.st_mode) else name)
            info.external_attr = about.st_mode << 16
            owner = struct.pack("<BBIBI", 1, 4, about.st_uid, 4, about.st_gid)
            info.extra = struct.pack("<HH", UNIX_OWNER, len(owner)) + owner
            if stat.S_ISREG(about.st_mode):
                info.compress_type = zipfile.ZIP_DEFLATED
                written.writestr(info, Path(name).read_bytes())
            elif stat.S_ISDIR(about.st_mode):
                written.writestr(info, b"")
    sys.stdout.buffer.write(packed.getvalue())


def extract(folder: Path) -> None:
    """Modes and, where that is allowed, owners are those in the archive."""
    with zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read())) as packed:
        for info in packed.infolist():
            path = folder / info.filename
            if info.is_dir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)
                path.write_bytes(packed.read(info))
        for info in packed.infolist():
            path = folder / info.filename
            path.chmod(stat.S_IMODE(info.external_attr >> 16))
            _, _, uid, _, gid = struct.unpack("<BBIBI", info.extra[4:15])
            if os.geteuid() == 0:
                os.chown(path, uid, gid)


def main(settings: dict[str, Any]) -> None:
    os.umask(0)
    action = {"sources": sources, "archive": archive, "extract": extract}[settings.pop("action")]
    action(Path(settings.pop("folder")), **settings)  # type: ignore[operator]


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
