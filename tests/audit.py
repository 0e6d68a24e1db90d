"""`make audit`: known vulnerabilities of the packages in `requirements.lock`.

pip-audit compares them with its database. Where it or its database cannot be reached, the versions are compared
with a few advisories that are stored here, and the output says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from tests.paths import ROOT

LOCK = ROOT / "requirements.lock"
# package → (first version without the vulnerability, its advisory)
ADVISORIES = {
    "aiohttp": ("3.12.14", "CVE-2025-53643"),
    "cryptography": ("44.0.1", "CVE-2024-12797"),
    "gitpython": ("3.1.41", "CVE-2024-22190"),
    "h11": ("0.16.0", "CVE-2025-43859"),
    "jinja2": ("3.1.6", "CVE-2025-27516"),
    "pillow": ("11.3.0", "CVE-2025-48379"),
    "protobuf": ("6.31.1", "CVE-2025-4565"),
    "pyarrow": ("14.0.1", "CVE-2023-47248"),
    "pyyaml": ("5.4", "CVE-2020-14343"),
    "ray": ("2.52.0", "CVE-2025-62593"),
    "requests": ("2.32.4", "CVE-2024-47081"),
    "setuptools": ("78.1.1", "CVE-2025-47273"),
    "starlette": ("0.49.1", "CVE-2025-62727"),
    "torch": ("2.6.0", "CVE-2025-32434"),
    "tornado": ("6.5.0", "CVE-2025-47287"),
    "urllib3": ("2.6.0", "CVE-2025-66418"),
    "werkzeug": ("3.0.6", "CVE-2024-49767"),
}
UV = str(Path(sys.executable).with_name("uv"))
SKIPPED = "could not be audited"  # pip-audit ends with 0 also if it found no package in the database
COMMAND = (UV, "tool", "run", "pip-audit", "--require-hashes", "--disable-pip", "-r")


def pins(text: str) -> dict[str, Version]:
    """The versions of a lock file."""
    return {
        name.lower(): Version(held) for name, held in re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, re.MULTILINE)
    }


def insecure(found: dict[str, Version]) -> list[str]:
    """The pins with a stored advisory."""
    return [
        f"{name}=={found[name]} is insecure ({advisory}): use {first} or newer"
        for name, (first, advisory) in ADVISORIES.items()
        if name in found and found[name] < Version(first)
    ]


def database(command: tuple[str, ...] = COMMAND, lock: Path = LOCK) -> tuple[int | None, str]:
    """Exit code and output of pip-audit; None if it or its database cannot be reached."""
    try:
        done = subprocess.run([*command, str(lock)], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return None, str(error)
    text = (done.stdout + done.stderr).strip()
    skipped = text.count(SKIPPED)
    if skipped > len(pins(lock.read_text(encoding="utf-8"))) / 2:
        return None, f"{skipped} packages {SKIPPED}"
    return done.returncode if done.returncode == 0 or "Found " in done.stderr else None, text


def main() -> int:
    """Print what is known; the exit code is 1 for a vulnerability."""
    code, text = database()
    if code is not None:
        print(text)
        return code
    found = pins(LOCK.read_text(encoding="utf-8"))
    problems = insecure(found)
    print(f"pip-audit cannot reach its database: {text.splitlines()[-1] if text else 'no output'}")
    print(f"{len(found)} packages of {LOCK.name}, compared with {len(ADVISORIES)} stored advisories only:")
    print("\n".join(problems or ["none of them applies"]))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
