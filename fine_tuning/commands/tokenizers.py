"""Command that compares tokenizers on the clean conversations, before a base model is chosen."""

import argparse
from itertools import islice
from pathlib import Path

from fine_tuning.common.errors import UserError


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Add tokenizers to the command line."""
    command = subparsers.add_parser("tokenizers", help="compare tokenizers on your conversations, side by side")
    command.add_argument(
        "names", nargs="+", metavar="TOKENIZER", help="a folder or its tokenizer.json, a .gguf file or a hub id"
    )
    command.add_argument("--data", type=Path, default=Path("data/clean"), help="folder of clean conversations")
    command.add_argument("--limit", type=int, default=1000, metavar="N", help="count the first N conversations")
    command.set_defaults(func=compare)


def compare(args: argparse.Namespace) -> None:
    """Print one Markdown table, a column a tokenizer."""
    from fine_tuning.common.settings import read_params
    from fine_tuning.data_collection.data_export import read_clean
    from fine_tuning.data_preparation.tokenizer import compare_tokenizers, comparison_table
    from fine_tuning.schema.chat_format import ChatSettings

    chat = read_params("chat", ChatSettings)
    conversations = list(islice(read_clean(args.data), args.limit))
    if not conversations:
        raise UserError(f"{args.data} has no conversations: run `dvc repro clean`")
    print(comparison_table(compare_tokenizers(args.names, conversations, chat.max_length, chat.system_prompt)))
