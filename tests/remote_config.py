"""`python -m tests.remote_config`: check that .dvc/config, which is in git, holds no secret."""

import re
from pathlib import Path

from fine_tuning.common.errors import UserError, run

CONFIG = Path(".dvc/config")
SECRET = re.compile(
    r"password|passphrase|secret|token|access_key|account_key|connection_string|sas_|_json$|auth_header"
)
WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")
ASKED_FOR = ("ask_password", "ask_passphrase")  # settings that say where a secret comes from, not what it is


def secrets(text: str) -> list[str]:
    """Names (never values) of the settings in DVC's configuration that hold a secret."""
    from configobj import ConfigObj

    found = []
    for section, settings in ConfigObj(text.split("\n"), list_values=False, interpolation=False).items():
        for key, value in settings.items() if isinstance(settings, dict) else ():
            name = f"{key} of {section}".replace("'", "")
            if (SECRET.search(key) and key not in ASKED_FOR) or WITH_PASSWORD.search(str(value)):
                found.append(name)
    return found


def check(path: Path = CONFIG) -> None:
    """See that the configuration holds no secret.

    Raises:
        UserError: it does; names the setting and where it belongs.
    """
    found = secrets(path.read_text()) if path.is_file() else []
    if found:
        raise UserError(
            f"{path} goes into git and holds a secret ({', '.join(found)}): change the secret, take it out, and "
            "set it with `dvc remote modify --local`"
        )


if __name__ == "__main__":
    run(check)
