"""`install.py`, which the Makefile calls: pip, with what is done and how far it is."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.project import ROOT


def wheel(folder: Path, name: str) -> None:
    """A package of one module."""
    record = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "x = 1\n")
        file.writestr(f"{record}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{record}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{record}/RECORD", "")


def install(folder: Path, *more: str) -> subprocess.CompletedProcess:
    words = (
        "-r",
        str(folder / "wanted.txt"),
        "--no-index",
        "--find-links",
        str(folder),
        "--target",
        str(folder / "to"),
    )
    command = [sys.executable, str(ROOT / "install.py"), str(folder / "install.log"), *words, *more]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_packages_are_counted_and_not_compiled(tmp_path):
    wheel(tmp_path, "one")
    wheel(tmp_path, "two")
    (tmp_path / "wanted.txt").write_text("# pinned\none==1.0\ntwo==1.0\n")
    done = install(tmp_path)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("packages: installing 2 (log: ") and "packages: 2 installed in " in done.stdout
    assert (tmp_path / "to/one.py").is_file() and not list((tmp_path / "to").rglob("*.pyc"))


def test_a_failed_installation_shows_the_end_of_its_log(tmp_path):
    (tmp_path / "wanted.txt").write_text("nowhere-to-be-found==1.0\n")
    done = install(tmp_path)
    assert done.returncode == 1 and "No matching distribution found for nowhere-to-be-found" in done.stdout
