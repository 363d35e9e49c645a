"""`pip install` that says how far it is: `python install.py LOG ARGUMENT…`, as the Makefile calls it.

It needs the standard library only. pip's own output goes into LOG; where pip fails, its end is shown. Bytecode is not
compiled: Python compiles what it imports, which is a small part of it, and the installation takes three fifths of the
time.
"""

import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-compile")
RESOLVING = 0.45  # share of the time that downloading takes, the rest is unpacking: an estimate
EVERY = 15.0  # seconds between two lines where there is no terminal


def main(log: Path, arguments: list[str]) -> int:
    """Run pip; its exit status."""
    wanted = sum(
        len(re.findall(r"^\w", Path(name).read_text(), re.MULTILINE)) for name in arguments if Path(name).is_file()
    )
    print(f"packages: installing {wanted} (log: {log})", flush=True)
    start, shown = time.time(), 0.0
    with open(log, "ab") as output:
        begin = output.tell()
        process = subprocess.Popen([sys.executable, *PIP, *arguments], stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            time.sleep(0.5)
            if time.time() - shown > (1.0 if sys.stdout.isatty() else EVERY) and time.time() - start > EVERY / 3:
                shown = time.time()
                print(
                    progress(log.read_bytes()[begin:], wanted, start),
                    end="\r" if sys.stdout.isatty() else "\n",
                    flush=True,
                )
    if process.returncode:
        print(b"\n".join(log.read_bytes()[begin:].splitlines()[-20:]).decode("utf-8", "replace"))
    else:
        print(f"packages: {wanted} installed in {time.time() - start:.0f} s".ljust(70))
    return process.returncode


def progress(said: bytes, wanted: int, start: float) -> str:
    """`packages: 40 of 103 found, 12 unpacked, about 60 s left`."""
    found = min(wanted, len(re.findall(rb"^(?:Collecting|Requirement already satisfied)", said, re.MULTILINE)))
    folders = Path(sysconfig.get_path("purelib")).glob("*.dist-info")
    unpacked = min(wanted, sum(folder.stat().st_ctime >= start for folder in folders))
    share = (RESOLVING * found + (1 - RESOLVING) * unpacked) / max(1, wanted)
    left = f", about {(time.time() - start) * (1 - share) / share:.0f} s left" if share > 0.05 else ""
    return f"packages: {found} of {wanted} found, {unpacked} unpacked{left}".ljust(70)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
