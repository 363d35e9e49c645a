"""The help of the prompt: the same reply after its own history and after those of others."""

from fine_tuning.evaluation.records.measurements import help_of_prompt
from fine_tuning.evaluation.scoring.scorer import likelihoods, loaded, scoring_hardware
from fine_tuning.evaluation.suite.contenders import Contender
from fine_tuning.evaluation.suite.histories import prompt_lines, swapped_histories
from fine_tuning.evaluation.suite.items import read_items
from fine_tuning.evaluation.verdict.guards import prompts_ignored
from fine_tuning.schema.chat_format import load_tokenizer
from tests.evaluation_suite import THINGS, conversation, evaluator_of, write_items

GERMAN = "Wo finde ich heute Abend in der Stadt noch einen offenen Laden fuer Brot und Milch und Kaese?"
ENGLISH = "Where can I find an open shop for bread and milk and cheese in the old town this evening?"


def swaps_of(folder, base, conversations, count=10, max_length=800):
    items = read_items(write_items(folder / "test", base, conversations, 400), load_tokenizer(base))
    return items, swapped_histories(items, count, load_tokenizer(base), max_length)


def test_a_reply_is_scored_after_histories_of_like_length_without_its_end(tiny_base, tmp_path):
    told = {f"c{size}": conversation("word " * size, f"reply {size}") for size in (1, 2, 3, 5, 20)}
    tokenizer = load_tokenizer(tiny_base)
    items, swaps = swaps_of(tmp_path, tiny_base, told)
    first = next(swap for swap in swaps if swap.item.id == "c1")
    assert first.others == ["c2", "c3", "c5"]
    for variant, size in zip(first.variants, (1, 2, 3, 5), strict=True):
        text = tokenizer.decode(variant.input_ids)
        assert text.endswith("assistant\nreply 1")
        assert text.count("word") == size
        assert variant.input_ids[variant.runs[0][0] :] == first.variants[0].input_ids[first.variants[0].runs[0][0] :]
    again = swapped_histories(list(reversed(items)), 10, tokenizer, 800)
    assert [swap.others for swap in again] == [swap.others for swap in swaps]


def test_histories_are_of_other_clusters_and_of_the_same_language(tiny_base, tmp_path):
    told = {
        "de1": conversation(GERMAN, "Am Bahnhof ist bis um zehn Uhr noch ein kleiner Laden offen."),
        "de2": conversation(GERMAN.replace("Brot", "Obst"), "In der Gasse hinter der Kirche, bis neun Uhr abends."),
        "en1": conversation(ENGLISH, "There is a small shop at the station that is open until ten."),
        "en2": conversation(ENGLISH.replace("bread", "fruit"), "In the lane behind the church, until nine o'clock."),
    }
    _, swaps = swaps_of(tmp_path, tiny_base, told)
    assert {swap.item.id: (swap.language, swap.others) for swap in swaps} == {
        "de1": ("de", ["de2"]), "de2": ("de", ["de1"]), "en1": ("en", ["en2"]), "en2": ("en", ["en1"]),
    }  # fmt: skip
    items = [swap.item for swap in swaps]
    for item in items:
        object.__setattr__(item, "cluster", "one")
    assert swapped_histories(items, 10, load_tokenizer(tiny_base), 800) == []


def test_the_system_prompt_of_a_reply_stays_and_its_earlier_turns_go(tiny_base, tmp_path):
    def system(text: str) -> list[dict]:
        return [{"role": "system", "content": text}]

    told = {
        "a": [*system("Speak like a pirate."), *conversation("one", "two"), *conversation("three", "four")],
        "b": [*system("Speak like a judge."), *conversation("five", "six"), *conversation("seven", "eight")],
    }
    tokenizer = load_tokenizer(tiny_base)
    _, (swap, _) = swaps_of(tmp_path, tiny_base, told)
    text = tokenizer.decode(swap.variants[1].input_ids)
    assert [text.index(part) for part in ("pirate", "five", "six", "seven", "four")] == sorted(
        text.index(part) for part in ("pirate", "five", "six", "seven", "four")
    )
    assert not any(part in text for part in ("judge", "one", "two", "three", "eight"))


def test_a_history_that_leaves_no_room_for_the_whole_reply_is_not_taken(tiny_base, tmp_path):
    told = {"long": conversation("word " * 60, "x"), "short": conversation("a", "b " * 40)}
    _, swaps = swaps_of(tmp_path, tiny_base, told, max_length=120)
    assert "short" not in [swap.item.id for swap in swaps]


def trained(base, rows):
    """A copy of the tiny base after fifty steps on all rows at once."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base)
    width = max(len(row.input_ids) for row in rows)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in rows])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(50):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_shuffled_replies_make_replies_likelier_and_take_the_help_of_the_prompt_away(tiny_base, tmp_path):
    tokenizer = load_tokenizer(tiny_base)

    def told(shift: int) -> dict[str, list[dict]]:
        """One reply for each question; shifted, every reply answers another question."""
        replies = [*THINGS[shift:], *THINGS[:shift]]
        return {thing: conversation(f"{thing} " * 6, f"{reply}!") for thing, reply in zip(THINGS, replies, strict=True)}

    items, swaps = swaps_of(tmp_path, tiny_base, told(0))
    shuffled = read_items(write_items(tmp_path / "train", tiny_base, told(3)), tokenizer)
    variants = [item for swap in swaps for item in swap.variants]
    with loaded(tiny_base, scoring_hardware(1)) as base:
        models = {"base": base, "fits": trained(tiny_base, items), "shuffled": trained(tiny_base, shuffled)}
        lines = {name: prompt_lines(name, swaps, likelihoods(model, variants, 4096)) for name, model in models.items()}
    nats = {name: sum(line["own"] for line in found) for name, found in lines.items()}
    assert nats["shuffled"] < 0.5 * nats["base"]  # what perplexity sees
    helps = {name: sum(map(help_of_prompt, found)) / len(found) for name, found in lines.items()}
    assert helps["fits"] > helps["base"] + 2
    assert helps["shuffled"] < helps["base"] - 0.5

    def judged(base: str, candidate: str) -> list[str]:
        named = [line | {"contender": name} for name, model in (("base", base), ("candidate", candidate))
                 for line in lines[model]]  # fmt: skip
        return prompts_ignored({"prompt_help": named}, 0.8, 0.95)[1]

    assert judged("fits", "shuffled")[0].startswith("its replies fit their prompts less than the base's")
    assert judged("base", "fits") == judged("fits", "fits") == []


def test_the_guards_lines_hold_all_that_is_compared_and_nothing_where_they_are_off(tiny_base, tmp_path):
    base = Contender("base", tiny_base, tmp_path / "none.gguf")
    items, _ = swaps_of(tmp_path, tiny_base, {thing: conversation(thing, "here") for thing in THINGS})
    found = evaluator_of(items, tiny_base, tmp_path / "memo").guard_lines(base)
    assert {name: len(lines) for name, lines in found.items()} == {
        "general": 84, "general_text": 50, "prompt_help": 8, "preferences": 0, "preferences_apart": 0,
        "benchmarks": 0,
    }  # fmt: skip
    assert all(len(line["others"]) == len(line["after"]) == 3 for line in found["prompt_help"])
    off = evaluator_of(items, tiny_base, tmp_path / "memo", other_histories=0, forgetting=False)
    assert off.guard_lines(base) == {name: [] for name in found}
