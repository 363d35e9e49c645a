"""Every command that a person can type, with its arguments and the function that runs it.

The module of a command is imported when the command was chosen: `--help` imports none of them.
"""

import argparse
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of a command line, of this process's if none is given; exit status 2 if they are wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fine_tuning", description="Fine-tune a local chatbot on its own conversations."
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: str, text: str, description: str | None = None) -> argparse.ArgumentParser:
        """A command; `run` is module:function in fine_tuning.commands."""
        command = subparsers.add_parser(name, help=text, description=description)
        command.set_defaults(run=run)
        return command

    def add_host(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--host", action="append", help="an Ollama to act on instead of deploy.host; may be repeated"
        )

    command = add("new", "new:new", "make a project of your own in a folder, with git, DVC and the app")
    command.add_argument("folder", type=Path, metavar="FOLDER")
    command = add(
        "import", "conversations:import_files", "take conversations from files of other tools",
        "Recognised: OpenAI, Anthropic or Hugging Face messages, ShareGPT, Alpaca, Dolly, prompt/completion, ChatML "
        "text, ChatGPT's conversations.json, Open WebUI's chats, feedback and webui.db, llm's logs.db, LM Studio, Jan, "
        "OpenTelemetry and Langfuse traces, preferences (chosen and rejected, or a label), CSV with a header, Parquet; "
        "JSON, JSON Lines, .gz, .zst.",
    )  # fmt: skip
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="or a folder of such files")
    command.add_argument(
        "--follow", action="store_true", help="take what is new since the last time, such as once an hour by cron"
    )
    command.add_argument("--model", metavar="NAME", help="who wrote the replies for which a file names no model")
    add("seal", "conversations:seal", "hand the conversations logged so far to the pipeline")
    add("sample", "conversations:bring_sample", "bring in the sample conversations, if params.yaml wants them")
    command = add("stats", "conversations:show_stats", "count what was logged since the last seal, or all with --all")
    command.add_argument("--all", action="store_true", help="count the sealed and imported conversations too")

    command = add("export", "conversations:export", "write the clean conversations into one file for other tools")
    command.add_argument(
        "format", metavar="FORMAT", help="json, csv, chatml, alpaca, instruction, openai, sharegpt, dpo or kto"
    )
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="below data/ if left out; compressed if it ends in .gz or .zst"
    )

    command = add(
        "round", "round:run_round", "seal, run the pipeline, commit what came of it with its verdict",
        "A round that fails or is stopped leaves results and models as they were. What was sealed stays sealed.",
    )  # fmt: skip
    command.add_argument(
        "--back", action="store_true", help="back to the last good state: data, results and models of that commit"
    )

    command = add("rounds", "rounds:rounds", "what the next round waits for; with --watch, run one when enough is new")
    command.add_argument("--watch", action="store_true", help="stay and run rounds, one at a time")
    command.add_argument("--install", action="store_true", help="write a service (systemd, launchd) that watches")

    add(
        "params", "params:params", "check every parameter in params.yaml",
        "DVC removes the outputs of a stage before it runs it, so that a stage that refuses a parameter costs them. "
        "`dvc repro` without a stage's name checks all sections first.",
    )  # fmt: skip

    command = add(
        "gateway", "gateway:serve", "record what other chat clients say to a model, between them and its server",
        "Speaks the API of Ollama, OpenAI or Anthropic, whichever the model's server does. See docs/gateway.md.",
    )  # fmt: skip
    command.add_argument(
        "--upstream",
        metavar="URL",
        help="the model's server, or `champion` for llama.cpp in here; deploy.host if left out",
    )
    command.add_argument("--port", type=int, metavar="N", help="where to listen; gateway.port if left out")
    command.add_argument(
        "--bind", default="127.0.0.1", metavar="ADDRESS", help="other than this machine only with a token (127.0.0.1)"
    )

    command = add(
        "adopt", "adopt:adopt", "take an adapter that was trained elsewhere as the candidate",
        "A LoRA adapter of peft, such as Unsloth, LLaMA-Factory and axolotl write, on the same base model.",
    )  # fmt: skip
    command.add_argument("folder", type=Path, metavar="FOLDER", help="with adapter_config.json and .safetensors")
    command.add_argument("--origin", metavar="TEXT", help="where it comes from, for the lineage; the folder's name")
    command.add_argument("--same-base", action="store_true", help="it names base.model by another name")
    command = add("promote", "promote:promote", "register the candidate and make it the champion")
    command.add_argument("version", nargs="?", help="a version that was champion before, instead of the candidate")
    command.add_argument("--force", metavar="WHY", help="promote without the verdict PROMOTE; the reason is recorded")
    command.add_argument("--by", metavar="NAME", help="who promotes; git's user.name if left out")
    command = add("deploy", "models:deploy", "put a version on Ollama, prove it, make it live")
    command.add_argument("version", nargs="?", help="a version's number; the champion if left out")
    command.add_argument(
        "--unproven", action="store_true", help="go live although prompts or answers could not be compared"
    )
    command.add_argument(
        "--canary", type=float, nargs="?", const=0.5, metavar="SHARE",
        help="put it beside the live version and let it answer this share of the new conversations (0.5)",
    )  # fmt: skip
    add_host(command)
    command = add("canary", "canary:canary", "how the canary does, and what follows from its end")
    command.add_argument("--stop", action="store_true", help="all conversations go to the live version again")
    command = add(
        "push", "push:push", "put the champion on the Hugging Face hub, with a model card",
        "Logs in as `hf auth login` did, or with HF_TOKEN. The repository is private unless --public is given.",
    )  # fmt: skip
    command.add_argument("where", choices=["hub"])
    command.add_argument("repo", metavar="OWNER/NAME")
    command.add_argument(
        "--what", choices=["adapter", "merged", "gguf", "data"], default="adapter",
        help="data: the masked conversations, as a data set (adapter)",
    )  # fmt: skip
    command.add_argument("--public", action="store_true", help="readable for everybody")
    command = add("switch", "models:switch", "make a deployed version live")
    command.add_argument("version", help="a version's number")
    add_host(command)
    add_host(add("rollback", "models:rollback", "make live what was live before"))
    command = add("prune", "models:prune", "take old versions off Ollama; the registry and DVC keep them")
    command.add_argument("--keep", type=int, default=3, metavar="N", help="the newest N stay (3), as do those in use")
    add_host(command)
    command = add("list", "models:list_versions", "versions, their aliases, and what is live where since when")
    command.add_argument("--json", action="store_true", help="as JSON")
    add_host(command)
    command = add("lineage", "lineage:lineage", "what made a version or a reply; which models a conversation taught")
    command.add_argument(
        "name", metavar="NAME", help="a version, a tag, an alias, or the id of a reply or conversation"
    )
    command.add_argument("--json", action="store_true", help="as JSON, with the ids of all conversations")
    command = add("verify", "verify:verify", "read again what DVC, registry and Ollama hold; name what is damaged")
    command.add_argument("--local", action="store_true", help="neither the remote nor Ollama")
    command.add_argument(
        "--rebuild", action="store_true", help="run HEAD's pipeline once more; name the first difference"
    )
    command.add_argument("--remote", help="a DVC remote other than the default one")
    command.add_argument("--json", action="store_true", help="as JSON")
    add_host(command)

    command = add(
        "forget", "forget:run_command",
        "take a conversation, or all of a session or a user, out of everything that can be reached",
        "Lists first where it is. Without --yes it asks; without a terminal to answer on, nothing is changed.",
    )  # fmt: skip
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("conversation", nargs="?", help="a conversation's id")
    which.add_argument("--session", metavar="S", help="all conversations of a session")
    which.add_argument("--user", metavar="U", help="all that a user said, by the metadata")
    which.add_argument("--deleted", action="store_true", help="all that was deleted in the app")
    which.add_argument("--expired", action="store_true", help="what the gateway recorded before gateway.retention_days")
    which.add_argument("--again", action="store_true", help="what another clone forgot, or what came back")
    which.add_argument("--resume", action="store_true", help="continue every run that did not finish")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.add_argument(
        "--withdraw", action="store_true", help="take models that learned from it out of aliases, registry and Ollama"
    )
    add_host(command)

    command = add(
        "review", "review:review", "choose, blind, between replies of the candidate and of what it is compared with",
        "Keys: 1 or 2 is better, 3 as good, 4 both bad, s skip, u undo, r results, q quit. Votes go to data/votes.",
    )  # fmt: skip
    command.add_argument("--by", metavar="NAME", help="who votes; git's user.name if left out")
    command.add_argument("--results", action="store_true", help="only print the win rate; later votes are marked")
    command = add(
        "judge", "review:judge", "let a model choose as well; it only advises",
        "Needs evaluate.judge in params.yaml: its server reads held-out conversations.",
    )  # fmt: skip
    command.add_argument("--pairs", type=int, metavar="N", help="the first N of the review's pairs; all if left out")
    command = add(
        "fit", "fit:fit", "what a base model needs here (memory, disk, time), before any download",
        "Exit status 1 if it does not fit. Estimates, meant to be right within a factor of two.",
    )  # fmt: skip
    command.add_argument("model", nargs="?", metavar="MODEL", help="as base.model takes it; base.model if left out")
    command = add("summary", "summary:summary", "print what decided in the last `dvc repro`")
    command.add_argument("--all", action="store_true", help="every metric, and what was left out")
    add("experiments", "experiments:experiments", "compare what was tried: a table, and the losses as a drawing")
    command = add("sbom", "supply_chain:sbom", "write what the bundle is made of: base, licences, data, dependencies")
    command.add_argument("--output", type=Path, default=Path("sbom.cdx.json"), help="CycloneDX 1.6 as JSON")
    command.add_argument("--licences", action="store_true", help="only print the dependencies with their licences")
    add("audit", "supply_chain:audit", "look the pinned packages up in the advisory database (pip-audit)")
    command = add("tokenizers", "tokenizers:compare", "compare tokenizers on your conversations, side by side")
    command.add_argument(
        "names", nargs="+", metavar="TOKENIZER", help="a folder or its tokenizer.json, a .gguf file or a hub id"
    )
    command.add_argument("--data", type=Path, default=Path("data/clean"), help="folder of clean conversations")
    command.add_argument("--limit", type=int, default=1000, metavar="N", help="count the first N conversations")
    command = add(
        "learning-curve", "learning_curve:learning_curve", "train on shares of the data: would more of it help?"
    )
    command.add_argument("--fractions", default="0.25,0.5,1", help="shares of the training tokens (0.25,0.5,1)")
    command = add(
        "budget", "budget:budget", "set prepare.max_train_tokens to what is trained here in a given time",
        "Uses the speed of the last training here. Training itself never looks at the clock, so that the same "
        "parameters give the same adapter everywhere.",
    )  # fmt: skip
    command.add_argument("time", help="such as 90s, 30m, 2h or 1h30m; none: no limit")
    command._negative_number_matcher = re.compile(r"-\d")  # `-5m` is a wrong time and not an option
    return parser.parse_args(words)


def run(arguments: argparse.Namespace) -> int | None:
    module, _, function = arguments.run.partition(":")
    return getattr(import_module(f"fine_tuning.commands.{module}"), function)(arguments)
