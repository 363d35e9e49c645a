"""A chat template tried in a child process: Jinja's sandbox keeps it from the machine, not from counting for ever.

The child imports nothing of this project, so that it starts quickly and runs from any folder.
"""

import json
import resource
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

SECONDS, MEMORY = 10, 4 << 30  # of CPU, and bytes of address space; a real template needs milliseconds
REFUSED = 3
_TURNS = [{"role": role, "content": text} for role, text in (("user", "Hello?"), ("assistant", "Hello."))] * 8
_CONVERSATIONS = [[{"role": "system", "content": "Be brief."}, *_TURNS], _TURNS, _TURNS[:3], _TURNS[:1]]
_TOOL = {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}}


def try_template(tokenizer: Any) -> None:
    """Let a tokenizer's chat template write a few plain conversations, with and without a tool on offer. Raises
    UserError if it takes more than SECONDS or MEMORY, or can write none of them."""
    request = {"template": tokenizer.chat_template, "tokens": tokenizer.special_tokens_map, "seconds": SECONDS}
    _try(json.dumps(request).encode())


@lru_cache(maxsize=16)
def _try(request: bytes) -> None:
    """A template that passed is not tried again in this process."""
    from fine_tuning.common.errors import UserError

    command = [sys.executable, "-P", __file__]
    status = subprocess.run(command, input=request, stderr=subprocess.DEVNULL).returncode
    if status:
        problem = "refuses every conversation" if status == REFUSED else f"needs over {SECONDS} s or {MEMORY >> 30} GiB"
        raise UserError(f"the chat template {problem}: choose another base.model, or mend its chat_template.jinja")


def main() -> None:
    """Read {"template", "tokens", "seconds"} from stdin; the exit status says how it went."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request, status = json.load(sys.stdin), REFUSED
    # The signal of this limit ends the process wherever it is, in Python or in C.
    limit = int(time.process_time()) + 1 + request["seconds"]
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    if sys.platform == "linux":  # elsewhere the system does not hold to it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for messages in _CONVERSATIONS:
        for options in ({"add_generation_prompt": True}, {"tools": [_TOOL]}):
            try:
                render_jinja_template([messages], chat_template=request["template"], **options, **request["tokens"])
                status = 0
            except MemoryError:
                sys.exit(1)
            except Exception:  # a program of somebody else's may fail in any way
                continue
    sys.exit(status)


if __name__ == "__main__":
    main()
