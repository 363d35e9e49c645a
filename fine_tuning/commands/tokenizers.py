"""Command that compares tokenizers on the clean conversations, before a base model is chosen."""

import argparse
from itertools import islice

from fine_tuning.common.errors import UserError
from fine_tuning.common.settings import read_params
from fine_tuning.data_collection.data_export import read_clean
from fine_tuning.data_preparation.tokenizer import compare_tokenizers, comparison_table
from fine_tuning.schema.chat_format import ChatSettings


def compare(args: argparse.Namespace) -> None:
    chat = read_params("chat", ChatSettings)
    conversations = list(islice(read_clean(args.data), args.limit))
    if not conversations:
        raise UserError(f"{args.data} has no conversations: run `dvc repro clean`")
    print(comparison_table(compare_tokenizers(args.names, conversations, chat.max_length, chat.system_prompt)))
