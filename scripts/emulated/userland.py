"""What emulation needs: qemu-user, and a Debian 12 of arm64 with Python and the wheels that a device would install.

Nothing of it is installed into the system but Debian's own packages, by root; the rest lies below the folder given.
qemu 7.2, which Debian 12 has, crashes in ONNX Runtime; 10.0 does not. So Debian 12 takes the emulator of Debian 13.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LEAST_QEMU = 10
PYTHON = "3.11"  # of Debian 12
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_PLATFORMS = ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")


class Missing(Exception):
    """What is needed and cannot be had here, in a line."""


def qemu(architecture: str, folder: Path) -> Path:
    """The emulator of a user's programs of that architecture; fetched where this is Debian or Ubuntu and root asks.

    Raises Missing.
    """
    name = f"qemu-{architecture}"
    for found in (shutil.which(name), folder / "qemu/usr/bin" / name):
        if found and Path(found).exists() and _version(Path(found)) >= LEAST_QEMU:
            return Path(found)
    _refuse_unless_root_on_debian(f"{name} of version {LEAST_QEMU} or newer (package qemu-user)")
    _fetch_qemu(folder)
    fetched = folder / "qemu/usr/bin" / name
    if not fetched.exists() or _version(fetched) < LEAST_QEMU:
        raise Missing(f"No {name} of version {LEAST_QEMU} or newer was found, here or in Debian 13.")
    return fetched


def qemu_version(emulator: Path) -> str:
    """As it says itself: 10.0.13."""
    said = subprocess.run([emulator, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\S+)", said)
    return found[1] if found else "unknown"


def arm64_root(folder: Path) -> Path:
    """A directory with Debian 12's files of arm64, Python among them. Raises Missing."""
    root = folder / "arm64"
    if (root / f"usr/bin/python{PYTHON}").exists():
        return root
    _refuse_unless_root_on_debian("debootstrap")
    shutil.rmtree(root, ignore_errors=True)
    if not shutil.which("debootstrap") or not _KEYRING.exists():
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "debootstrap", "debian-archive-keyring")
    mirror = [_mirror()] if _mirror() else []
    wanted = "--include=python3,python3-venv,ca-certificates"
    _run("debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", wanted, "bookworm", str(root), *mirror)
    for package in sorted((root / "var/cache/apt/archives").glob("*.deb")):  # unpacked, not configured: enough to run
        _run("dpkg", "-x", str(package), str(root))
    return root


def arm64_site(folder: Path) -> Path:
    """Dependencies of runtime and server for arm64, in the versions of constraints.txt. Raises Missing."""
    site = folder / "site"
    stamp = site / "wheels.txt"
    wanted = "\n".join(_requirements())
    if stamp.exists() and stamp.read_text() == wanted:
        return site
    shutil.rmtree(site, ignore_errors=True)
    platforms = [option for each in _PLATFORMS for option in ("--platform", f"{each}_aarch64")]
    try:
        _run(
            sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--target", str(site),
            "--python-version", PYTHON, "--implementation", "cp", *platforms, *wanted.split("\n"),
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        raise Missing("The wheels for arm64 could not be fetched: see what pip said.") from error
    stamp.write_text(wanted)
    return site


def _requirements() -> list[str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    names = [re.match(r"[A-Za-z0-9_-]+", each) for each in wanted]
    pins = dict(
        line.strip().lower().split("==", 1)
        for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    found = [name[0].lower() for name in names if name]
    return [f"{name}=={pins[name]}" if name in pins else name for name in found]


def _fetch_qemu(folder: Path) -> None:
    """Debian 13's package, unpacked into the folder: the system keeps its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _KEYRING.exists():
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "debian-archive-keyring")
    mirror = _mirror()
    if not mirror:
        raise Missing(f"Install qemu-user {LEAST_QEMU} or newer: this system's packages have none that is new enough.")
    apt, where = folder / "apt", folder / "qemu"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    where.mkdir(exist_ok=True)
    (apt / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror} trixie main\n")
    options = [
        f"-oDir::Etc::SourceList={apt / 'sources.list'}", "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={apt / 'lists'}", f"-oDir::Cache={apt / 'cache'}", "-oAPT::Sandbox::User=root",
    ]  # fmt: skip
    _run("apt-get", *options, "update", "-qq")
    _run("apt-get", *options, "download", "-qq", "qemu-user", cwd=where)
    for package in where.glob("qemu-user_*.deb"):
        _run("dpkg", "-x", str(package), str(where))


def _refuse_unless_root_on_debian(what: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Missing(f"This needs {what}: install it, or run this as root on Debian or Ubuntu, which fetches it.")


def _mirror() -> str:
    """Where this system has its Debian packages from; "" where it has them from nowhere, or is no Debian."""
    if "ID=debian" not in Path("/etc/os-release").read_text().split():
        return ""
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        found = re.search(r"^URIs:\s*(\S+)", path.read_text(), re.MULTILINE)
        if found:
            return found[1]
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt").glob("sources.list.d/*.list"))]
    for path in lists:
        found = re.search(r"^deb (?:\[.*\] )?(\S+)", path.read_text(), re.MULTILINE) if path.exists() else None
        if found:
            return found[1]
    return ""


def _version(emulator: Path) -> int:
    try:
        return int(qemu_version(emulator).split(".")[0])
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True)
