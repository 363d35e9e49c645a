"""The champion on the Hugging Face hub: its files with a model card, in a repository of one's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.base_model import hub_id
from fine_tuning.training.model_card import results

# Folder in models/champion, files there (the base's card may hold a path of this machine), what loads them, and what
# they are to the base.
KINDS = {
    "adapter": ("adapter", ("adapter_config.json", "adapter_model.safetensors"), "peft", "adapter"),
    "merged": ("merged", ("*.safetensors*", "*config.json", "tokenizer*", "*.jinja"), "transformers", "finetune"),
    "gguf": ("package", ("model.gguf", "Modelfile"), "gguf", "quantized"),
}
MEASURED = ("perplexity", "nll_per_byte", "token_accuracy")


def champion_files(champion: Path, what: str) -> dict[str, Path]:
    """{path in the repository: file} of the champion's adapter, merged model or GGUF."""
    folder, patterns, *_ = KINDS[what]
    return {file.name: file for pattern in patterns for file in sorted((champion / folder).glob(pattern))}


def champion_card(champion: Path, what: str, base: dict[str, Any], evaluation: dict[str, Any]) -> bytes:
    """The adapter's card for what is pushed: its base if a hub knows it, and what was measured on the test split.

    Args:
        base: content of base.json.
        evaluation: content of metrics/evaluation.json as it was when it became champion; may be empty.
    """
    card = ModelCard((champion / "adapter/README.md").read_text(encoding="utf-8"))
    card.text = card.text.replace(base["model"], Path(base["model"]).name)
    data: Any = card.data
    data.base_model = hub_id(base)
    data.datasets = None  # they are not on the hub
    data.library_name, relation = KINDS[what][2:]
    data.base_model_relation = relation if data.base_model else None
    values = {name: entry["value"] for name, entry in evaluation.get("candidate", {}).items() if name in MEASURED}
    data.eval_results = [*(data.eval_results or []), *results("test", values)]
    return str(card).encode()


def upload(repo: str, files: Mapping[str, Path | bytes], message: str, kind: str, public: bool) -> str:
    """Put files into a repository in one commit, which is made if it is not there, private unless `public`; the
    commit's address.

    Args:
        kind: model or dataset.

    Raises:
        UserError: the hub refuses or does not answer.
    """
    api = HfApi()
    try:
        api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo, repo_type=kind).private:
            raise UserError(f"{repo} is public already: give --public if everybody may read this, or another name")
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        return str(api.create_commit(repo, operations, commit_message=message, repo_type=kind).commit_url)
    except UserError:
        raise
    except Exception as error:  # by whatever the network, the hub or a missing token raises
        reason = getattr(getattr(error, "response", None), "status_code", None) or type(error).__name__
        raise UserError(f"the hub did not take {repo} ({reason}): check name, network and `hf auth login`") from None


def dataset_card(count: int) -> bytes:
    """The card of a data set of so many conversations in OpenAI's messages form."""
    head = "pretty_name: Conversations\ntask_categories: [text-generation]\ntags: [chat, whetstone]"
    text = f"{count} conversations. Personal data was masked by rules."
    return f"---\n{head}\n---\n\n# Conversations\n\n{text}\n".encode()
