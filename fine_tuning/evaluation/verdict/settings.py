"""The section `compare` of params.yaml."""

from typing import Literal

from pydantic import Field

from fine_tuning.common.settings import Settings

PREFERENCE = "preference_accuracy"  # measured on held-out pairs, by no metric module
WIN_RATE = "win_rate"  # of people's votes
DECIDES = 20.0  # evidence that decides: wrong in at most one case of twenty


class CompareSettings(Settings):
    """The section `compare`."""

    primary: str
    minimum_effect: float = Field(ge=0)
    minimum_conversations: int = Field(ge=2)
    minimum_against_champion: int = Field(ge=2)
    secondary: dict[str, float]
    quantisation_tolerance: float = Field(ge=0)
    golden_lead: float = Field(ge=0)
    text_tolerance: float = Field(ge=0)
    prompt_help: float | None = Field(ge=0, le=1)
    votes: Literal["counted", "required"] = "counted"

    def needed(self, baseline: str) -> int:
        """How many different conversations a verdict against this baseline needs."""
        return self.minimum_against_champion if baseline == "champion" else self.minimum_conversations
