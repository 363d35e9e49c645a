"""`install.py`, which the Makefile calls: pip, with what is done and how far it is."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.project import ROOT


def wheel(folder: Path, name: str) -> Path:
    """A package of one module."""
    record = f"{name}-1.0.dist-info"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "x = 1\n")
        file.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{record}/RECORD", "")
    return path


def install(folder: Path, *wanted: str) -> subprocess.CompletedProcess:
    """Install packages that lie in `folder`, whose requirements are lines of a file."""
    (folder / "wanted.txt").write_text("\n".join(("# pinned", *wanted)) + "\n")
    words = ("-r", str(folder / "wanted.txt"), "--no-deps", "--target", str(folder / "to"))
    command = [sys.executable, str(ROOT / "install.py"), str(folder / "install.log"), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_packages_are_counted_and_not_compiled(tmp_path):
    addresses = (f"{name} @ {wheel(tmp_path, name).as_uri()}" for name in ("one", "two"))
    done = install(tmp_path, *addresses)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("packages: installing 2 (log: ") and "packages: 2 installed in " in done.stdout
    assert (tmp_path / "to/one.py").is_file() and not list((tmp_path / "to").rglob("*.pyc"))


def test_a_failed_installation_shows_the_end_of_its_log(tmp_path):
    gone = tmp_path / "gone-1.0-py3-none-any.whl"
    done = install(tmp_path, f"gone @ {gone.as_uri()}")
    assert done.returncode == 1 and "No such file" in done.stdout and str(gone) in done.stdout
