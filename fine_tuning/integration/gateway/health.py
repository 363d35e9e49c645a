"""The gateways of a checkout that run on this machine, and what their `/health` counts: no content."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from fine_tuning.common.records import read_object, updating

RUNNING = Path(".whetstone/gateways.json")  # port → address, by the gateways themselves
TOKEN = "WHETSTONE_GATEWAY_TOKEN"
SECONDS = 1.0
OF_ALL_INTERFACES = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def announce(checkout: Path, bind: str, port: int) -> None:
    """Name a gateway of the checkout. It stays named when it has ended, and does not answer then."""
    host = OF_ALL_INTERFACES.get(bind, bind)
    with updating(checkout / RUNNING) as known:
        known[str(port)] = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def gateways(checkout: Path, token: str | None) -> dict[str, dict[str, Any] | str]:
    """Address → the answer of /health, or why a gateway does not give it, of each that runs."""
    headers = {"Authorization": f"Bearer {os.environ.get(TOKEN) or token}"}
    found: dict[str, dict[str, Any] | str] = {}
    for address in read_object(checkout / RUNNING).values():
        # Nothing listens where a gateway has ended, or another program by now.
        with suppress(httpx.HTTPError, ValueError, TypeError):
            try:
                answer = httpx.get(f"{address}/health", headers=headers, timeout=SECONDS, trust_env=False)
            except httpx.ReadTimeout:
                found[address] = "it does not answer"
                continue
            if answer.status_code == 401:
                found[address] = f"set ${TOKEN} for the app, too"
            elif "recording" in answer.json():
                found[address] = answer.json()
    return found
