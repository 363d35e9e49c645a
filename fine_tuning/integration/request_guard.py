"""Whether an HTTP request was sent to this server by a name of its own, and by a page of its own or by no page."""

from collections.abc import Collection

from starlette.types import Scope


def is_own(scope: Scope, names: Collection[str], port: int, needs_origin: bool = False) -> bool:
    """Exact Host and Origin, port included: a name of somebody else's that leads to this machine is not ours.

    Args:
        names: host names and addresses of this server, with a port where it differs from `port`.
        needs_origin: whether a request without an Origin, which every page sends that changes something, is refused.
    """
    headers = [(name, value.decode("latin-1").lower()) for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == b"host"]
    origins = [value for name, value in headers if name == b"origin"]
    secure = scope["scheme"] in ("https", "wss") or port == 443
    suffix = "" if port == (443 if secure else 80) else f":{port}"
    if len(hosts) != 1 or hosts[0] not in {_with_port(name.strip().lower(), suffix) for name in names}:
        return False
    if not origins:
        return not needs_origin
    return origins == [f"{'https' if secure else 'http'}://{hosts[0]}"]


def _with_port(name: str, suffix: str) -> str:
    return f"[{name}]{suffix}" if name.count(":") > 1 and "[" not in name else name if ":" in name else name + suffix
