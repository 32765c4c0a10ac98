"""Options of an evaluation: the data, the task and its settings."""

from dataclasses import dataclass
from typing import Literal

from ...errors import ArgumentError, printable
from ...processing.pictures import MAX_PIXELS
from ...processing.prompts import CLASS_NAMES, TEMPLATES
from ..arguments import EMOJI, check_values, option, require_at_least_one
from ..data.sources import is_shards

PROBES = ("linear-probe", "few-shot")  # tasks that train a classifier
RERANKERS = {"matching": "reranked_", "captioning": "reranked_lm_"}  # what can re-rank, with the prefix of its metrics
TaskName = Literal[
    "zero-shot", "retrieval", "captioning", "vqa", "itm", "nlvr", "composition", "linear-probe", "few-shot"
]


def check_rerankers(names: str) -> None:
    """Raise ArgumentError unless --rerank_by names what can re-rank."""
    if not names or set(names.split(",")) - set(RERANKERS):
        raise ArgumentError(f"--rerank_by must be {' or '.join(RERANKERS)}, or both: got {printable(names, 60)!r}.")


@dataclass(kw_only=True)
class EvaluationArguments:
    """The options of `accelerate launch -m vlp.training.evaluate`: the data, the task and its settings."""

    dataset: str = option(EMOJI, "data to evaluate on, as --dataset_name of training; not shards")
    dataset_config_name: str | None = option(None, "configuration of a hub data set, or of the scenes")
    split: str = option("test", "split to evaluate on")
    train_split: str = option("train", "linear-probe, few-shot: split to train the classifier on")
    validation_split: str | None = option(
        None, "linear-probe: split to choose the regularisation on; a fifth of the training split if not given"
    )
    task: TaskName = option("zero-shot", "task to evaluate")
    image_column: str = option("image", "column with the images, or with their paths")
    second_image_column: str = option("second_image", "nlvr: column with the image on the right")
    image_root: str | None = option(None, "folder that image paths start from; that of the data file if not given")
    encoding: str | None = option(None, "encoding of a table, such as cp1252; UTF-8 if not given")
    caption_column: str = option(
        "caption", "column with a caption or a list of captions, or several columns joined by commas; vqa: the question"
    )
    class_column: str | None = option(
        None,
        "zero-shot, linear-probe, few-shot: column with the class; if not given, the first ClassLabel column, or else "
        "the captions",
    )
    class_names: str | None = option(
        None, f"zero-shot: names of integer labels: a file with one name per line, or one of {', '.join(CLASS_NAMES)}"
    )
    templates: str = option("name", f"zero-shot: prompt templates to average over, one of {', '.join(TEMPLATES)}")
    group_column: str | None = option(
        None, "zero-shot, vqa, nlvr, composition, linear-probe: also report the accuracy for each value of this column"
    )
    wrong_column: str = option("wrong", "composition: column with the false caption")
    shots: str = option("1,2,4,8,16", "few-shot: numbers of training pictures per class, joined by commas")
    few_shot_draws: int = option(3, "few-shot: random draws of the training pictures to average over")
    answer_column: str = option("answers", "vqa: column with the human answers")
    answer_list: str | None = option(None, "vqa: file of candidate answers to rank, one per line")
    label_column: str = option("label", "nlvr: column with the label: whether the caption is true of both images")
    rerank_top_k: int = option(0, "retrieval: candidates per query that are re-ranked by matching (ITM); 0: none")
    rerank_posterior: bool | None = option(
        None,
        "re-rank by ITC probability times ITM odds, not by cosine plus ITM logit as the original does; as in the "
        "model's training if not given",
    )
    rerank_by: str = option(
        "matching",
        "what re-ranks: matching (ITM), captioning (the probability of the caption, BLIP only), or both, as "
        "matching,captioning",
    )
    prompt: str | None = option(
        None,
        "captioning: prompt that captions start with, which is removed from the result; that of the model's training "
        "if not given",
    )
    save_predictions: bool = option(
        False,
        "captioning, vqa: also write the generated texts, as NAME.predictions.json in the format of COCO's and VQAv2's "
        "result files",
    )
    num_beams: int = option(3, "captioning, vqa: number of beams")
    max_length: int = option(30, "captioning, vqa: maximum number of tokens to generate")
    answer_top_k: int = option(128, "vqa: candidates of --answer_list that are scored in full")
    embedding_size: int | None = option(
        None, "use only the first dimensions of the embeddings, this many, of a model trained with --embedding_sizes"
    )
    batch_size: int = option(64, "images or texts per batch and process")
    num_threads: int | None = option(
        None, "CPU threads per process when computing on the CPU; if not given, the cores divided by the processes"
    )
    max_samples: int | None = option(None, "evaluate only on the first rows; all rows if not given")
    max_image_pixels: int = option(MAX_PIXELS, "larger images, in pixels, are skipped as decompression bombs")
    resamples: int = option(1000, "bootstrap resamples for the 95 % intervals; 0: no intervals")
    seed: int = option(0, "seed of the bootstrap")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "precision of the model")
    output_dir: str | None = option(
        None, "folder for the results; MODEL/evaluations, or runs/evaluations/NAME for a hub name, if not given"
    )

    def __post_init__(self):
        check_values(self)
        if self.templates not in TEMPLATES:
            raise ArgumentError(f"--templates must be one of {', '.join(TEMPLATES)}, got {self.templates!r}.")
        require_at_least_one(
            self, "batch_size", "num_beams", "max_length", "max_image_pixels", "answer_top_k", "few_shot_draws"
        )
        if not all(word.strip().isdecimal() and int(word) for word in self.shots.split(",")):
            raise ArgumentError(f"--shots must be whole numbers joined by commas, got {printable(self.shots, 60)!r}.")
        if self.task in PROBES and self.validation_split == self.train_split:
            raise ArgumentError(f"--validation_split {self.train_split} is the training split: choose another split.")
        if self.task in PROBES and self.split in (self.train_split, self.validation_split):
            raise ArgumentError(f"--split {self.split} is what the classifier learns from: choose another split.")
        check_rerankers(self.rerank_by)
        if self.save_predictions and self.task not in ("captioning", "vqa"):
            raise ArgumentError(f"--save_predictions has no effect on --task {self.task}, which generates no text.")
        if self.embedding_size is not None and self.task not in ("zero-shot", "retrieval", "itm", "composition"):
            raise ArgumentError(f"--embedding_size has no effect on --task {self.task}, which compares no embeddings.")
        for name in ("resamples", "rerank_top_k"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"--{name} must not be negative, got {getattr(self, name)}.")
        require_at_least_one(self, "max_samples", "embedding_size", "num_threads")
        if is_shards(self.dataset):
            raise ArgumentError("Evaluation needs random access to the rows: --dataset cannot be shards.")

    @property
    def text_column(self) -> str | None:
        """The column with the texts, or with the classes if a class column is given and the task uses it."""
        uses_classes = self.task == "zero-shot" or self.task in PROBES
        return (self.class_column or self.caption_column) if uses_classes else self.caption_column
