"""Public benchmarks: tasks of lm-evaluation-harness, asked and scored by its own code."""

import hashlib
import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fine_tuning.common.errors import UserError
from fine_tuning.common.results import Memo
from fine_tuning.evaluation.records.record_types import finite
from fine_tuning.evaluation.scoring.scorer import loaded
from fine_tuning.evaluation.suite.contenders import Contender
from fine_tuning.evaluation.suite.items import chat_format
from fine_tuning.runtime.hardware import Hardware
from fine_tuning.schema.chat_format import load_tokenizer

HARNESS = "lm-eval==0.4.13"
BATCH = 8  # questions


class Benchmarks:
    """Tasks of the harness by name, with their data.

    Args:
        names: tasks, groups or tags of the harness or of `folder`; none: nothing is measured.
        questions: at most so many of each task, the first; None: all.
        folder: task files (YAML) of one's own; they win over the harness's of the same name.

    Raises:
        UserError: the harness is not installed, a task is unknown, or its data are not at hand.
    """

    def __init__(self, names: Sequence[str], questions: int | None, folder: Path) -> None:
        self.names, self.questions = list(names), questions
        if not names:
            return
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(f"evaluate.benchmarks needs lm-evaluation-harness: `pip install {HARNESS}`")
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = TaskManager(include_path=str(folder))
        self._identity = [version("lm_eval"), questions]
        for name in names:
            if name not in self._manager.task_index:
                raise UserError(f"evaluate.benchmarks names {name}, which is no task of {HARNESS} or of {folder}")
            for task in self._load(name).values():
                if getattr(task, "UNSAFE_CODE", False):
                    raise UserError(f"evaluate.benchmarks: {name} runs code that a model writes: take it out")
                asked = json.dumps([task.dump_config(), list(task.eval_docs)[:questions]], default=str, sort_keys=True)
                self._identity.append(hashlib.sha256(asked.encode()).hexdigest())

    def _load(self, name: str) -> dict[str, Any]:
        try:
            tasks: dict[str, Any] = self._manager.load([name])["tasks"]
        except ModuleNotFoundError as error:
            raise UserError(f"evaluate.benchmarks: {name} needs more: `pip install {error.name}`") from None
        except Exception as error:  # the harness and `datasets` raise whatever a server or a file gave them
            what = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
            raise UserError(f"evaluate.benchmarks: the data of {name} are not at hand ({what})") from None
        return tasks

    def ask(
        self, contender: Contender, system_prompt: str | None, hardware: Hardware, memo: Memo
    ) -> list[dict[str, Any]]:
        """Lines of benchmarks.jsonl: what each metric of a task says of each question, questions in the chat template.

        Metrics that are no mean over questions are left out. Retrieved examples do not stand before the questions.
        """
        if not self.names:
            return []
        tokenizer, prompt = load_tokenizer(contender.folder), contender.system_prompt or system_prompt

        def compute() -> list[dict[str, Any]]:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM

            print(f"evaluate: {contender.name} {', '.join(self.names)}", flush=True)
            with loaded(contender.folder, hardware) as model:
                found = simple_evaluate(
                    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH), tasks=self.names,
                    task_manager=self._manager, limit=self.questions, bootstrap_iters=0, apply_chat_template=True,
                    system_instruction=prompt,
                )  # fmt: skip
            return [line for task in found["samples"] for line in question_values(task, found)]

        key = ["benchmarks", contender.weights_sha256(), *chat_format(tokenizer), prompt]
        lines = memo.get([*key, *self._identity, hardware.device, hardware.precision], compute)
        return [{"contender": contender.name} | line for line in lines]


def question_values(task: str, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """{"metric", "id", "value", "better"} of each question, for the metrics whose mean over questions is the harness's
    own value; `found` is what `simple_evaluate` returned."""
    by_metric: dict[tuple[str, str], dict[Any, Any]] = {}
    for sample in found["samples"][task]:
        for metric in sample["metrics"]:
            by_metric.setdefault((metric, sample["filter"]), {})[sample["doc_id"]] = sample[metric]
    lines = []
    for (metric, chosen), values in by_metric.items():
        mean = found["results"][task].get(f"{metric},{chosen}")
        numbers = all(isinstance(value, bool | int | float) for value in values.values())
        if not (numbers and isinstance(mean, int | float) and abs(sum(values.values()) / len(values) - mean) < 1e-6):
            continue
        better = found["higher_is_better"][task].get(metric)
        name = f"{task}/{metric}" if chosen == "none" else f"{task}/{metric}/{chosen}"
        direction = {"better": {True: 1, False: -1}.get(better, 0)}
        lines += [{"metric": name, "id": f"{task}/{id}", "value": finite(v)} | direction for id, v in values.items()]
    return lines
