"""What answers as `name:live` on a server, since when, and how to put another version there."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from fine_tuning.common.errors import UserError
from fine_tuning.common.names import host_key
from fine_tuning.model_management.model_deployer import LIVE, ModelServer, go_live
from fine_tuning.model_management.model_registry import CHAMPION, PREVIOUS, ModelRegistry
from fine_tuning.model_management.sqlite_registry import ModelVersion

STAMP = "%Y%m%dT%H%M%S.%fZ"
LIVE_TAG = re.compile(r"live\.(\d{8}T\d{6}\.\d{6}Z)")


@dataclass(frozen=True)
class Live:
    """What a server answers with as `name:live`; `version` is None when it is none of ours."""

    host: str
    digest: str
    version: int | None
    since: datetime | None


class ModelSwitcher:
    """Switches one server between the versions that were deployed to it."""

    def __init__(self, server: ModelServer, registry: ModelRegistry) -> None:
        self.server = server
        self.registry = registry
        self.name = registry.name
        self.live_name = f"{registry.name}:{LIVE}"
        self.key = host_key(server.host)
        self._tags = (f"ollama.{self.key}.digest", f"ollama.{self.key}.deployed_at")

    def recorded_digest(self, version: ModelVersion) -> str | None:
        """Manifest digest that was recorded when the version was deployed to this server."""
        return version.tags.get(self._tags[0])

    def record(self, number: int, digest: str) -> None:
        """Keep the digest of a version that was deployed to this server."""
        self.registry.set_tags(number, dict(zip(self._tags, (digest, datetime.now(UTC).isoformat()), strict=True)))

    def record_live(self, number: int) -> None:
        """Keep that a version went live here now, unless it was live already."""
        history = live_history(self.registry.versions(), self.key)
        if not history or history[-1][1] != number:
            self.registry.set_tags(number, {f"live.{datetime.now(UTC).strftime(STAMP)}": self.key})

    def live(self) -> Live | None:
        """What is live; None if nothing is."""
        digests = self.server.digests()
        digest = digests.get(self.live_name)
        if digest is None:
            return None
        versions = self.registry.versions()
        history = live_history(versions, self.key)
        matches = [version.number for version in versions if self.recorded_digest(version) == digest]
        number = history[-1][1] if history and history[-1][1] in matches else (matches[-1] if matches else None)
        since = history[-1][0] if history and history[-1][1] == number else None
        return Live(self.server.host, digest, number, since)

    def switch(self, number: int) -> Live | None:
        """Make a deployed version live. Returns what was live before. Raises UserError if the version was not deployed
        to this server, or is no longer what was."""
        version = self.registry.version(number)
        digest = self.recorded_digest(version)
        if digest is None or version.tag not in self.server.digests():
            raise UserError(f"{version.tag} is not on {self.server.host}: `python -m fine_tuning deploy {number}`")
        before = self.live()
        go_live(self.server, version.tag, self.live_name, digest)
        self.record_live(number)
        return before

    def rollback(self) -> tuple[Live | None, int]:
        """Make live what was live before. Returns (what was live until now, the version that is live again). Raises
        UserError if there is nothing to go back to."""
        now = self.live()
        current = now.version if now else None
        history = live_history(self.registry.versions(), self.key)
        earlier = [number for _, number in history if number != current]
        if not earlier:
            previous = self.registry.by_alias(PREVIOUS)
            if previous is None or previous.number == current:
                raise UserError(f"nothing was live on {self.server.host} before: `python -m fine_tuning list`")
            earlier = [previous.number]
        self.switch(earlier[-1])
        return now, earlier[-1]

    def prune(self, keep: int) -> list[str]:
        """Take old versions off the server: all but the newest `keep`, what is live, what `rollback` goes back to, the
        champion and the previous one. The registry and DVC keep them all. Returns the names that are gone.
        """
        versions, digests, now = self.registry.versions(), self.server.digests(), self.live()
        here = [v for v in versions if digests.get(v.tag) and digests[v.tag] == self.recorded_digest(v)]
        current = now.version if now else None
        earlier = [number for _, number in live_history(versions, self.key) if number != current]
        needed = {current, *earlier[-1:], *(version.number for version in here[-keep:])}
        gone = []
        for version in here:
            if version.number not in needed and not {CHAMPION, PREVIOUS} & set(version.aliases):
                self.server.delete(version.tag)
                self.registry.delete_tags(version.number, self._tags)
                gone.append(version.tag)
        return gone


@dataclass(frozen=True)
class WentLive:
    """A version went live on a host, which is named by its `host_key`."""

    at: datetime
    host: str
    number: int


def deployments(version: ModelVersion) -> list[tuple[str, str]]:
    """(host's key, manifest digest) of each server that the version was deployed to."""
    found = ((re.fullmatch(r"ollama\.(.+)\.digest", tag), value) for tag, value in version.tags.items())
    return sorted((match[1], digest) for match, digest in found if match)


def went_live(versions: Iterable[ModelVersion]) -> list[WentLive]:
    """Every time that one of the versions went live anywhere, the oldest first."""
    found = []
    for version in versions:
        for tag, host in version.tags.items():
            stamp = LIVE_TAG.fullmatch(tag)
            if stamp:
                found.append(WentLive(datetime.strptime(stamp[1], STAMP).replace(tzinfo=UTC), host, version.number))
    return sorted(found, key=lambda event: event.at)


def live_history(versions: Iterable[ModelVersion], key: str) -> list[tuple[datetime, int]]:
    """(when, version) of each time a version went live on the host with this key, the oldest first."""
    return [(event.at, event.number) for event in went_live(versions) if event.host == key]
