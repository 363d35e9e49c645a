"""Go templates derived from Jinja templates of many shapes: exact to the byte, or refused."""

import pytest

from fine_tuning.common.errors import UserError
from fine_tuning.model_management.packaging.chat_template import (
    collate,
    conversation_bank,
    derive_template,
    jinja_renderer,
    prove_template,
    render_go,
    turn_openers,
)
from fine_tuning.schema.chat_format import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = {
    "chatml": CHATML,
    "chatml that trims contents": CHATML.replace("m['content']", "m['content'] | trim"),
    "qwen with a default system prompt": (
        "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}"
        "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
        "{%- for m in messages %}{%- if (m.role == 'user') or (m.role == 'system' and not loop.first) "
        "or m.role == 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
    ),
    "llama 3": (
        "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set c = '<|begin_of_text|>' + c %}"
        "{% endif %}{{ c }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "<bos>{%- if messages[0]['role'] == 'system' -%}{%- set p = messages[0]['content'] + '\n\n' -%}"
        "{%- set rest = messages[1:] -%}{%- else -%}{%- set p = '' -%}{%- set rest = messages -%}{%- endif -%}"
        "{%- for m in rest -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
        "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
        "{%- set r = 'model' if m['role'] == 'assistant' else m['role'] -%}"
        "{{ '<start_of_turn>' + r + '\n' + (p if loop.first else '') }}{{ m['content'] | trim }}"
        "{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>' }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}\n{% endif %}"
    ),
    "mistral, system inside the last user turn": (
        "{%- if messages[0]['role'] == 'system' %}{%- set s = messages[0]['content'] %}{%- set rest = messages[1:] %}"
        "{%- else %}{%- set rest = messages %}{%- endif %}{{- '<s>' }}{%- for m in rest %}"
        "{%- if m['role'] == 'user' %}{%- if loop.last and s is defined %}"
        "{{- '[INST] ' + s + '\n\n' + m['content'] + '[/INST]' }}{%- else %}"
        "{{- '[INST] ' + m['content'] + '[/INST]' }}{%- endif %}"
        "{%- else %}{{- ' ' + m['content'] + '</s>' }}{%- endif %}{%- endfor %}"
    ),
    "mistral without system prompts": (
        "{{ '<s>' }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + '</s> ' }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% if messages[0]['role'] != 'system' %}Below is an instruction.\n\n{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
        "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m['content'] + '</s>\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "braces, quotes and carriage returns around turns": (
        "{% for m in messages %}{{ '{{' + m['role'] + '}}\"\"\"\r\n' + m['content'] + '\"\"\"{' }}{% endfor %}"
        '{% if add_generation_prompt %}{{ \'{{assistant}}"""\' }}{% endif %}'
    ),
}
QWEN_TOOLS = (
    "{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
TOOLS = {
    "a role like the others": CHATML,
    "responses grouped in one user turn": QWEN_TOOLS,
    "llama 3's other name, trimmed": FAMILIES["llama 3"].replace(
        "+ m['role'] +", "+ ('ipython' if m['role'] == 'tool' else m['role']) +"
    ),
}
NO_TOOLS = {
    "left out": CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"),
    "refused": CHATML.replace(
        "<|im_start|>{{", "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}<|im_start|>{{", 1
    ),
    "rewritten": CHATML.replace(
        "{{ m['content'] }}", "{{ (m['content'] | tojson) if m.role == 'tool' else m['content'] }}"
    ),
    "numbered": CHATML.replace("{{ m['role'] }}", "{{ m['role'] }}{{ loop.index if m.role == 'tool' }}"),
}
REFUSED = {
    "llama 2, which trims system and user together": (
        "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0]['content'] %}"
        "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}"
        "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and s != false %}{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m['content'] %}"
        "{% else %}{% set c = m['content'] %}{% endif %}"
        "{% if m['role'] == 'user' %}{{ '<s>' + '[INST] ' + c.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + c.strip() + ' ' + '</s>' }}{% endif %}{% endfor %}"
    ),
    "numbered turns": CHATML.replace("<|im_start|>{{", "<|im_start|>{{ loop.index }} {{", 1),
    "shouted contents": CHATML.replace("m['content']", "m['content'] | upper"),
    "the first reply written otherwise": CHATML.replace(
        "{{ m['content'] }}", "{{ '(greeting) ' if loop.index0 == 1 }}{{ m['content'] }}"
    ),
    "contents cut short": CHATML.replace("m['content']", "m['content'][:40]"),
    "long contents marked": CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ '!' if 'def f' in m.content }}"),
    "only two turns kept": CHATML.replace("in messages", "in messages[-2:]"),
}


@pytest.fixture(scope="module")
def renderer(tiny_base):
    def of(template, system_prompt=None):
        tokenizer = load_tokenizer(tiny_base)
        tokenizer.chat_template = template
        return jinja_renderer(tokenizer, system_prompt)

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_the_go_template_writes_the_same_bytes_as_the_jinja_template(family, renderer):
    jinja = renderer(FAMILIES[family])
    assert prove_template(derive_template(jinja), jinja, conversation_bank()) >= 36


def with_tools(*contents: str) -> list[dict]:
    results = [{"role": "tool", "content": content} for content in contents]
    before = [{"role": "user", "content": " Weather? "}, {"role": "assistant", "content": ""}]
    return [*before, *results, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "Sure?"}]


@pytest.mark.parametrize("shape", TOOLS)
def test_results_of_tools_are_written_as_the_jinja_template_writes_them(shape, renderer):
    jinja = renderer(TOOLS[shape])
    conversations = [with_tools("{}"), with_tools(" 1 ", '"2"\n'), with_tools("")[:3]]
    assert prove_template(derive_template(jinja), jinja, conversations) == 3


@pytest.mark.parametrize("shape", NO_TOOLS)
def test_where_go_cannot_say_results_of_tools_everything_else_is_still_exact(shape, renderer):
    jinja = renderer(NO_TOOLS[shape])
    template = derive_template(jinja)
    assert '"tool"' not in template
    assert prove_template(template, jinja, conversation_bank()) >= 36


@pytest.mark.parametrize("shape", REFUSED)
def test_a_template_that_go_cannot_say_exactly_is_refused(shape, renderer):
    jinja = renderer(REFUSED[shape])
    with pytest.raises(UserError, match="choose another base"):
        prove_template(derive_template(jinja), jinja, conversation_bank())


@pytest.mark.parametrize(
    "attack",
    [
        "{{ cycler.__init__.__globals__.os.system('touch stolen') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% for n in range(1000000000) %}{% endfor %}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ 1 / 0 }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_template_neither_runs_nor_ends_in_a_traceback(attack, renderer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as told:
        derive_template(renderer(attack + CHATML))
    assert "\n" not in str(told.value) and not (tmp_path / "stolen").exists()


def test_the_systems_prompt_of_the_parameters_is_part_of_the_template(renderer):
    for prompt in ("Be brief.", "", 'Say "{{ yes }}"\n\n'):
        jinja = renderer(CHATML, prompt)
        template = derive_template(jinja)
        assert prove_template(template, jinja, conversation_bank())
        assert render_go(template, [{"role": "user", "content": "Hi"}]).startswith(
            f"<|im_start|>system\n{prompt}<|im_end|>"
        )


@pytest.mark.parametrize("edit", [("\n", "\n\n"), ("\n", " "), ("<|im_end|>", "<|im_end|> "), ("user", "User")])
def test_one_changed_character_is_found_and_shown(edit, renderer):
    jinja = renderer(CHATML)
    with pytest.raises(UserError, match="differs: Jinja '"):
        prove_template(derive_template(jinja).replace(*edit, 1), jinja, conversation_bank())


def test_a_difference_in_a_private_conversation_is_told_by_place_only(renderer):
    jinja = renderer(CHATML)
    secret = [{"role": "user", "content": "my secret"}]
    with pytest.raises(UserError) as error:
        prove_template(derive_template(jinja).replace("user", "secret "), jinja, [secret], private=True)
    assert "secret" not in str(error.value) and "character" in str(error.value)


def test_neighbours_of_one_role_are_joined_as_ollama_does():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert [m["content"] for m in collate(messages)] == ["a\n\nb", "c"]
    results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert collate(results) == results


def test_turns_open_with_control_tokens(renderer):
    control = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert turn_openers(renderer(CHATML), control, ["<|im_end|>"]) == ["<|im_start|>"]
    assert turn_openers(renderer(FAMILIES["llama 3"]), control, ["<|eot_id|>"]) == ["<|start_header_id|>"]
    assert turn_openers(renderer(FAMILIES["alpaca"]), control, ["</s>"]) == []
