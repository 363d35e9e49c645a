"""LlamaEngine: one GGUF in a process of its own that starts quietly, ends cleanly and fails in words."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.runtime.gguf_writer import write_gguf
from fine_tuning.runtime.llama_engine import LlamaEngine
from tests.tiny import next_token_logprobs

PROMPT = "<|im_start|>user\nWhat is 2024?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def gguf(tiny_base, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "tiny.gguf"
    write_gguf(tiny_base, path, "F16")
    return path


@pytest.fixture(scope="module")
def engine(gguf):
    with LlamaEngine(gguf, context=256, threads=1, slots=4) as running:
        yield running


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_tokens_are_those_of_the_tokenizer_and_no_bos_is_doubled(engine, tiny_base):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_base)
    ids = engine.tokenize(PROMPT)
    assert ids == tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert engine._post("/detokenize", {"tokens": ids})["content"] == PROMPT


def test_control_tokens_in_text_stay_text_when_asked(engine):
    assert len(engine.tokenize("<|im_end|>", parse_special=True)) == 1
    assert len(engine.tokenize("<|im_end|>", parse_special=False)) > 1


def test_next_token_probabilities_are_those_of_transformers(engine, tiny_base):
    import torch
    from transformers import AutoModelForCausalLM

    ids = engine.tokenize(PROMPT)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(tiny_base)(torch.tensor([ids])).logits[0, -1]
    expected = torch.log_softmax(logits.double(), -1)
    found = next_token_logprobs(engine, ids, 512)
    assert len(found) == 512
    assert max(abs(logprob - expected[token].item()) for token, logprob in found) < 5e-3


def test_greedy_completions_are_the_same_alone_and_side_by_side(engine):
    prompts = [engine.tokenize(PROMPT.replace("2024", str(number))) for number in range(6)]
    done = []
    together = engine.complete_many(prompts, max_tokens=8, on_done=done.append)
    assert [completion.ids for completion in together] == [engine.complete(p, max_tokens=8).ids for p in prompts]
    assert len(done) == 6
    assert all(len(completion.ids) <= 8 for completion in together)


def test_a_seed_repeats_a_sampled_completion(engine):
    ids = engine.tokenize(PROMPT)
    first, again, other = ("".join(engine.complete_stream(ids, 12, temperature=1.5, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_stop_string_finishes_a_reply(engine):
    ids = engine.tokenize(PROMPT)
    whole = engine.complete(ids, 12)
    assert not whole.finished
    cut = "".join(engine.complete_stream(ids, 12, temperature=0, stop=[whole.text[3:5]]))
    assert cut == whole.text[: whole.text.index(whole.text[3:5])]


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("text", ["the dog.<|im_end|>", "日本 é<|im_end|>", "e\u0301"])
def test_forced_scores_equal_the_probabilities_of_each_next_token(engine, text, cut):
    """Also of tokens that are half a character, and where the target ends with one."""
    ids, target = engine.tokenize(PROMPT), engine.tokenize(text)
    target = target[: len(target) - cut]
    scores = engine.score(ids, target)
    steps = engine.forced_logprobs(ids, target, 3)
    for position, (token, score) in enumerate(zip(target, scores, strict=True)):
        likeliest = next_token_logprobs(engine, [*ids, *target[:position]], 512)
        assert score.logprob == pytest.approx(dict(likeliest)[token], abs=2e-3)
        assert score.first == (likeliest[0][0] == token)
        assert [number for number, _ in steps[position]] == [number for number, _ in likeliest[:3]]
        assert steps[position][2][1] == pytest.approx(likeliest[2][1], abs=2e-3)


def test_a_reply_is_streamed_in_pieces_and_can_be_broken_off(engine):
    ids = engine.tokenize(PROMPT)
    assert len(list(engine.complete_stream(ids, max_tokens=8, temperature=0))) > 1
    stream = engine.complete_stream(ids, max_tokens=200)
    next(stream)
    stream.close()
    assert engine.complete(ids, 2).ids


def test_the_gguf_carries_its_chat_template(engine):
    expected = "<|im_start|>system\nYou answer briefly.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    assert engine._post("/apply-template", asked)["prompt"].startswith(expected)


def test_replies_name_the_file_and_no_path_of_this_machine(engine, gguf):
    asked = {"messages": [{"role": "user", "content": "What is 2024?"}], "max_tokens": 2}
    assert engine._post("/v1/chat/completions", asked)["model"] == gguf.name


def test_only_this_machine_is_served_and_only_with_the_key(engine):
    import urllib.error
    import urllib.request

    assert engine.base_url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(f"{engine.base_url}/completion", b'{"prompt": "a"}')
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    assert refused.value.code == 401


def test_a_prompt_beyond_the_context_is_one_clear_line(engine):
    with pytest.raises(UserError, match="300 tokens exceeds the context of 256"):
        engine.complete([5] * 300, 4)


def test_it_starts_without_a_word(gguf, capfd):
    with LlamaEngine(gguf, context=64, threads=1):
        pass
    assert capfd.readouterr() == ("", "")


def test_the_process_is_gone_after_the_block_even_after_an_error(gguf):
    with pytest.raises(ZeroDivisionError), LlamaEngine(gguf, context=64, threads=1) as running:
        pid = running.pid
        raise ZeroDivisionError
    assert not is_running(pid)
    assert running.pid is None


def test_the_process_ends_when_its_parent_is_killed(gguf, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from fine_tuning.runtime.llama_engine import LlamaEngine\n"
        f"engine = LlamaEngine(Path({str(gguf)!r}), context=64, threads=1).start()\n"
        "print(engine.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_for_the_end(pid)


def wait_for_the_end(pid: int) -> None:
    """Until the process is gone, or is a zombie that nobody has asked for."""
    process = psutil.Process(pid) if is_running(pid) else None
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(200):
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.1)
        pytest.fail("the process still runs")


ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.fixture
def endless(tiny_base, tmp_path):
    """A GGUF with which llama.cpp counts while it loads: it tries the chat template."""
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(ENDLESS)
    write_gguf(tmp_path / "base", tmp_path / "endless.gguf", "F16")
    return tmp_path / "endless.gguf"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_process_ends_with_its_parent_while_it_loads(endless, end):
    script = (
        "from pathlib import Path; from fine_tuning.runtime.llama_engine import LlamaEngine\n"
        f"LlamaEngine(Path({str(endless)!r}), context=64, threads=1).start()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, start_new_session=True) as parent:
        watched = psutil.Process(parent.pid)
        while not (children := watched.children()) or sum(children[0].cpu_times()[:2]) < 2:
            assert parent.poll() is None
            time.sleep(0.05)
        os.killpg(parent.pid, end) if end == signal.SIGINT else parent.kill()
    wait_for_the_end(children[0].pid)


def test_loading_has_a_time_limit_whatever_llama_cpp_does(endless):
    engine = LlamaEngine(endless, context=64, threads=1, timeout=3)
    with pytest.raises(UserError, match=r"did not load within 3 s"):
        engine.start()


def test_a_killed_process_is_one_clear_line(gguf):
    with LlamaEngine(gguf, context=64, threads=1) as running:
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"llama\.cpp died"):
            running.complete([5], 4)
        assert not running.alive


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        (b"hello", "is not a GGUF file that llama.cpp can load .*magic"),
        (b"GGUF\x03\x00\x00\x00", "is not a GGUF file that llama.cpp can load"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, words):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words), LlamaEngine(path, context=64, threads=1):
        pass


def test_a_time_out_is_one_clear_line(gguf):
    with LlamaEngine(gguf, context=1000, threads=1) as running:
        running.timeout = 0.05
        with pytest.raises(UserError, match=r"no answer within 0\.05 s"):
            running.complete([5], 900)
