"""A page for a model: it scores captions, describes pictures, answers questions or judges statements, as the model can.

This is the app.py of a Space that `vlp space` has written. It needs neither vlp nor a network: the folder model/ has
the weights and the code.
"""

import json
from pathlib import Path

import gradio as gr
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

FOLDER = Path(__file__).with_name("model")
CODE = {"trust_remote_code": True}  # the code in model/, which is part of this Space
MOST, LONGEST = 100, 500  # captions; characters of a question or statement
PROMPT = "Question: {} Short answer:"  # of BLIP-2, as in training

processor = AutoProcessor.from_pretrained(FOLDER, **CODE)
config = json.loads((FOLDER / "config.json").read_text())
classes, architecture = config["auto_map"], config["architectures"][0]
model = AutoModel.from_pretrained(FOLDER, **CODE).eval()
writer = None
if "AutoModelForImageTextToText" in classes:
    same = classes["AutoModelForImageTextToText"] == classes["AutoModel"]
    writer = model if same else AutoModelForImageTextToText.from_pretrained(FOLDER, **CODE).eval()
compares = architecture in ("VlpClipModel", "VlpBlipForPreTraining", "VlpBlipForImageTextRetrieval")
continues = hasattr(model, "language_model")  # BLIP-2 and InstructBLIP, which continue a prompt
answers = continues or architecture == "VlpBlipForQuestionAnswering"
reasons = architecture == "VlpBlipForVisualReasoning"


@torch.inference_mode()
def score(picture, text: str) -> dict[str, float]:
    """The probability of each caption, one per line: one of them is right, or, with SigLIP's bias, each by itself."""
    captions = list(dict.fromkeys(line.strip() for line in (text or "").splitlines() if line.strip()))
    if picture is None or not captions:
        raise gr.Error("Choose a picture, and write one caption per line.")
    if len(captions) > MOST:
        raise gr.Error(f"Write at most {MOST} captions.")
    images = processor.image_processor(images=picture, return_tensors="pt")
    texts = processor(text=captions, return_tensors="pt")
    image, words = (
        torch.nn.functional.normalize(output.pooler_output, dim=-1)
        for output in (model.get_image_features(**images), model.get_text_features(**texts))
    )
    scale = model.logit_scale.exp() if hasattr(model, "logit_scale") else 1 / model.temp
    logits, bias = (scale * image @ words.T)[0], getattr(model, "logit_bias", None)
    shares = logits.softmax(dim=-1) if bias is None else (logits + bias).sigmoid()
    return dict(zip(captions, shares.tolist(), strict=True))


@torch.inference_mode()
def describe(picture) -> str:
    """A caption of the picture."""
    if picture is None:
        raise gr.Error("Choose a picture.")
    inputs = processor(images=picture, return_tensors="pt")
    return processor.decode_texts(writer.generate(**inputs, num_beams=3, max_new_tokens=20))[0].strip()


@torch.inference_mode()
def answer(picture, question: str) -> str:
    """The answer to a question about the picture."""
    if picture is None or not (question or "").strip():
        raise gr.Error("Choose a picture, and write a question.")
    question = question.strip()[:LONGEST]
    inputs = processor(images=picture, text=PROMPT.format(question) if continues else question, return_tensors="pt")
    generated = model.generate(**inputs, num_beams=3, max_new_tokens=10)
    read = inputs["input_ids"].shape[1] if continues and not model.language_model.config.is_encoder_decoder else 0
    return processor.decode_texts(generated[:, read:])[0].strip()


@torch.inference_mode()
def judge(left, right, statement: str) -> dict[str, float]:
    """The probability that the statement is true of two pictures."""
    if left is None or right is None or not (statement or "").strip():
        raise gr.Error("Choose two pictures, and write a statement.")
    pair = processor.image_processor(images=[left, right], return_tensors="pt")["pixel_values"][None]
    ids = processor(text=[statement.strip()[:LONGEST]], return_tensors="pt")["input_ids"]
    shares = model(ids, pair).logits.softmax(dim=-1)[0].tolist()
    return dict(zip(("false", "true"), shares, strict=True))


def picture_of(label: str) -> gr.Image:
    return gr.Image(type="pil", label=label)


pages = {}
if compares:
    captions = gr.Textbox(lines=4, label="Captions, one per line", value="a cat\na dog\na rocket")
    pages["Score captions"] = gr.Interface(
        score, [picture_of("Picture"), captions], gr.Label(num_top_classes=10, label="Probability"),
        flagging_mode="never",
    )  # fmt: skip
if writer is not None:
    pages["Describe"] = gr.Interface(
        describe, picture_of("Picture"), gr.Textbox(label="Caption"), flagging_mode="never"
    )  # fmt: skip
if answers:
    question = gr.Textbox(label="Question", value="what colour is it?")
    pages["Ask"] = gr.Interface(
        answer, [picture_of("Picture"), question], gr.Textbox(label="Answer"), flagging_mode="never"
    )  # fmt: skip
if reasons:
    statement = gr.Textbox(label="Statement", value="both pictures show a circle")
    pages["Judge a statement"] = gr.Interface(
        judge, [picture_of("Left"), picture_of("Right"), statement], gr.Label(label="Is it true?"),
        flagging_mode="never",
    )  # fmt: skip
about = FOLDER.with_name("README.md").read_text(encoding="utf-8").splitlines()
title = next((line[2:] for line in about if line.startswith("# ")), "vlp")
page = gr.TabbedInterface(list(pages.values()), list(pages), title=title)

if __name__ == "__main__":
    page.launch()
