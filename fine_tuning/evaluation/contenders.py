"""The models that are compared: where they lie and what they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fine_tuning.errors import UserError
from fine_tuning.project import main_checkout, sha256_file
from fine_tuning.records import read_json


@dataclass(frozen=True)
class Contender:
    """A model in its two forms: the folder that is scored and the GGUF that replies."""

    name: str
    folder: Path
    gguf: Path

    def weights_sha256(self) -> str:
        """Hash of the folder's weights and configuration.

        Raises:
            UserError: there are none.
        """
        files = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        if len(files) == 1 or not files[-1].is_file():
            raise UserError(f"{self.folder} holds no model: run `dvc repro`, or `dvc pull` where it was made elsewhere")
        return hashlib.sha256("".join(file.name + sha256_file(file) for file in files).encode()).hexdigest()


def champion_folder(record: Path) -> Path:
    """Where the files of the champion lie that the JSON file `record` names, such as models/champion.json.

    A temporary experiment's folder has no files that no stage depends on: there it is the main checkout's.
    """
    folder = record.with_suffix("")
    return folder if folder.is_dir() else main_checkout() / folder


def find_champion(record: Path) -> Contender | None:
    """The champion that the JSON file `record` names; None before there is one.

    Raises:
        UserError: its files are missing or are not those that were promoted.
    """
    champion = read_json(record)
    if champion.get("version") is None:
        return None
    folder = champion_folder(record)
    found = Contender("champion", folder / "merged", folder / "package" / "model.gguf")
    if not (found.folder / "config.json").is_file() or not found.gguf.is_file():
        raise UserError(f"the champion's files are missing in {folder}: run `dvc pull {folder}`")
    for key, file in (("gguf_sha256", found.gguf), ("merged_sha256", found.folder / "model.safetensors")):
        if champion.get(key) and not (file.is_file() and sha256_file(file) == champion[key]):
            raise UserError(f"{file} is not the file that was promoted: run `dvc checkout --force {folder}`")
    return found


def refuse_own_words(references: Sequence[str], base: Path, record: Path) -> None:
    """See that no author of references is base or champion themselves, by the names that the app logs them under.

    Raises:
        UserError: one is.
    """
    card, champion = base / "base.json", read_json(record)
    own = {str(read_json(card).get("model"))} if card.is_file() else set()
    if champion.get("version") is not None:
        own |= {f"{champion.get('name')}:{champion['version']}", f"{champion.get('name')}:live"}
    if named := sorted(own & set(references)):
        raise UserError(
            f"evaluate.references names {', '.join(named)}, which is itself compared, and its own words favour it: "
            "take it out in params.yaml"
        )
