"""What a check-up found."""

import dataclasses
import json
from dataclasses import dataclass, field

from ..arguments import publishable
from ..data.caption_facts import CaptionFacts
from ..data.survey import CheckArguments
from .advice import Advice
from .fit import Misfit


@dataclass
class Findings:
    """All that the check-up found.

    Attributes:
        rows: number of rows to train on.
        pictures: number of different files among their pictures.
        unreadable: by cause, the rows whose picture or caption cannot be used, and an example of each cause.
        examples: an example of each cause.
        advice_for_paths: where missing pictures would be found.
        sizes: quantiles of the shorter side, in pixels, and of the aspect.
        formats: number of pictures by format.
        copies: groups of rows with identical files.
        alike: groups of rows whose pictures look the same, but are different files.
        leaks: (row to train on, row to evaluate on, whether the files are identical).
        eval_rows: number of rows to evaluate on.
        eval_unreadable: by cause, the rows to evaluate on whose picture cannot be read.
        eval_examples: an example of each of these causes.
        advice_for_eval_paths: where missing pictures to evaluate on would be found.
        captions: what is known of the captions.
        misfits: the pairs that fit worst, with --model.
        alike_to_model: (row, row, cosine of their embeddings) of other pictures that look alike to --model.
        advice: what to choose.
    """

    rows: int = 0
    pictures: int = 0
    unreadable: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    advice_for_paths: str = ""
    sizes: dict[str, list[float]] = field(default_factory=dict)
    sides: list[int] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    copies: list[list[int]] = field(default_factory=list)
    alike: list[list[int]] = field(default_factory=list)
    leaks: list[tuple[int, int, bool]] = field(default_factory=list)
    eval_rows: int = 0
    eval_unreadable: dict[str, list[int]] = field(default_factory=dict)
    eval_examples: dict[str, str] = field(default_factory=dict)
    advice_for_eval_paths: str = ""
    captions: CaptionFacts = field(default_factory=CaptionFacts)
    misfits: list[Misfit] = field(default_factory=list)
    alike_to_model: list[tuple[int, int, float]] = field(default_factory=list)
    advice: Advice = field(default_factory=Advice)

    @property
    def usable(self) -> int:
        """The number of rows to train on that can be used; each of the others has one cause."""
        return self.rows - sum(map(len, self.unreadable.values()))

    def as_json(self, arguments: CheckArguments) -> str:
        """The findings and the options as JSON."""
        content = dataclasses.asdict(self)
        del content["sides"]
        content["advice"]["command"] = self.advice.command
        content["arguments"] = publishable(dataclasses.asdict(arguments))
        return json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n"
