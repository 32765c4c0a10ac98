"""How good a fine-tuned BLIP is at questions (VQA) and at reasoning about two images (NLVR2)."""

import torch

from ...modeling_vlp.blip_tasks import VlpBlipForQuestionAnswering, VlpBlipForVisualReasoning
from ..data.rows import BadRow, answers_of, decode_image, label_of
from .base import Evaluator, batched
from .scores import vqa_accuracy


class QuestionEvaluator(Evaluator):
    """VQA accuracy by ranking a list of answers, and by writing them.

    Args: as `Evaluator`, whose captions ask;
        answer_column: the answers that people gave. answers: what is ranked.
        top_k: answers that are scored in full; num_beams, max_length: of the answers written.
    """

    def __init__(
        self, *args, answer_column: str, answers: list[str], top_k: int, num_beams: int, max_length: int, **kw
    ):
        super().__init__(*args, **kw)
        self.answers, self.top_k, self.num_beams, self.max_length = answers, top_k, num_beams, max_length
        self.given = []
        for number in self.rows:
            try:
                self.given.append(answers_of(self.source[number], answer_column))
            except BadRow:
                self.given.append([])

    @torch.inference_mode()
    def __call__(self, model: VlpBlipForQuestionAnswering, processor) -> dict[str, float]:
        """Accuracies from 0 to 1, over the questions that have answers."""
        training = model.training
        model.eval()
        scores: dict[str, list[float]] = {"vqa_accuracy_ranked": [], "vqa_accuracy_generated": []}
        for chunk in batched(range(len(self.captions)), self.batch_size):
            for name, answers in zip(scores, self.answer(model, processor, chunk), strict=True):
                given = [self.clean(processor, self.given[self.owner[place]]) for place in chunk]
                scores[name] += [vqa_accuracy(a, g) for a, g in zip(answers, given, strict=True) if g]
        model.train(training)
        return {name: sum(values) / max(len(values), 1) for name, values in scores.items()}

    def clean(self, processor, texts: list[str]) -> list[str]:
        """Texts as the model would write them."""
        return processor.write(processor.read_texts(texts, self.max_length)["input_ids"]) if texts else []

    def answer(self, model, processor, places: list[int]) -> tuple[list[str], list[str]]:
        """The best of the list and the written answer to some of the questions."""
        images = [
            decode_image(self.source[self.rows[self.owner[p]]][self.image_column], self.max_pixels) for p in places
        ]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        ids = processor.read_texts([self.captions[p] for p in places], self.max_length)["input_ids"].to(model.device)
        listed = processor.read_texts(self.answers, self.max_length)["input_ids"].to(model.device)
        ranked = model.rank(pixels, ids, listed, self.top_k).tolist()
        written = model.generate(pixels, ids, num_beams=self.num_beams, max_length=self.max_length, do_sample=False)
        return self.clean(processor, [self.answers[number] for number in ranked]), processor.write(written)

    def examples(self, model, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """Some questions, drawn by `seed`, with the first answer given and the one written."""
        chosen, pictures = self.draw(count, seed)
        places = [self.owner.index(number) for number in chosen]
        with torch.inference_mode():
            written = self.answer(model, processor, places)[1]
        labels = [(self.clean(processor, self.given[number]) or [""])[0] for number in chosen]
        return [
            {"image": picture.convert("RGB"), "label": label, "predictions": [(answer, None)]}
            for picture, label, answer in zip(pictures, labels, written, strict=True)
        ]


class ReasoningEvaluator(Evaluator):
    """Accuracy of telling whether captions are true of two images.

    Args: as `Evaluator`, whose images are those on the left;
        second_image_column, label_column: the images on the right, and whether the caption is true.
    """

    def __init__(self, *args, second_image_column: str, label_column: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.second_image_column, self.label_column = second_image_column, label_column

    @torch.inference_mode()
    def __call__(self, model: VlpBlipForVisualReasoning, processor) -> dict[str, float]:
        """The share of captions that are told rightly; rows that cannot be used are left out."""
        training = model.training
        model.eval()
        right = []
        for chunk in batched(self.usable(), max(1, self.batch_size // 2)):
            images = [image for pair, _, _ in chunk for image in pair]
            pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(
                model.device, model.dtype
            )
            ids = processor.read_texts([text for _, text, _ in chunk], 512)["input_ids"].to(model.device)
            logits = model(ids, pixels.unflatten(0, (-1, 2))).logits
            right += (logits.argmax(dim=1).cpu() == torch.tensor([label for _, _, label in chunk])).tolist()
        model.train(training)
        return {"nlvr_accuracy": sum(right) / max(len(right), 1)}

    def usable(self):
        """Both images, the caption and the label of every caption whose row is whole."""
        for place, caption in enumerate(self.captions):
            row = self.source[self.rows[self.owner[place]]]
            try:
                pair = [decode_image(row[c], self.max_pixels) for c in (self.image_column, self.second_image_column)]
                yield pair, caption, label_of(row, self.label_column)
            except BadRow:
                continue

    def examples(self, model, processor, count: int = 12, seed: int = 0) -> list[dict]:
        """None: one picture would not show what was asked."""
        return []
