"""A llama of a hundred thousand parameters with a real byte-level tokenizer: the base model of the tests."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fine_tuning.runtime.base_model import BaseSettings

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou answer briefly.<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

TEXT = """The quick brown fox jumps over the lazy dog. What is machine learning? How do I reset my password?
Try turning it off and on again. The capital of France is Paris. I do not know, but I can find out for you.
Please restart the router, then check whether the cable is plugged in. Hello! How can I help you today?
def add(a, b):\n    return a + b\n1. First\n2. Second\n2024-01-31 10:15 3.14159"""


def write_tiny_base(folder: Path, seed: int = 0, vocabulary: int = 512, spread: float = 0.02, text: str = TEXT) -> Path:
    """Write a loadable Hugging Face model folder: 2 layers, hidden size 64, 4 heads, 2 key-value heads.

    Another size of vocabulary, or another text, is another tokenizer; 259 is the least: every byte and three control
    tokens. Weights of a small spread make a model that repeats the last token; with 1.0 its reply depends on the whole
    prompt.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    core.train_from_iterator(text.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=spread,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.mkdir(parents=True, exist_ok=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def base_settings(model: str, revision: str | None = None, **changes: object) -> "BaseSettings":
    """The section `base` for a base that the tests made themselves."""
    from fine_tuning.runtime.base_model import BaseSettings

    values = {"chat_template_sha256": None, "trust_remote_code": False, "gguf_converter": None, **changes}
    return BaseSettings(model=model, revision=revision, **values)


if __name__ == "__main__":
    print(write_tiny_base(Path(sys.argv[1])))


def next_token_logprobs(engine, ids: list[int], n: int) -> list[tuple[int, float]]:
    """The `n` likeliest next tokens after exactly `ids` by llama.cpp, with natural-log probabilities."""
    body = {
        "prompt": ids,
        "n_predict": 1,
        "n_probs": n,
        "temperature": 0,
        "post_sampling_probs": False,
        "cache_prompt": False,  # a reused prefix is computed in other batches and differs in the last digits
        # Half a character would be held back and its probabilities with it: a whole one is forced, and the
        # probabilities are those from before.
        "logit_bias": [[engine.tokenize("a")[-1], 1000.0]],
    }
    first = engine._post("/completion", body)["completion_probabilities"][0]
    return [(top["id"], top["logprob"]) for top in first["top_logprobs"]]
