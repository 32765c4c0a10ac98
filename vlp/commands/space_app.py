"""A page for a model: it scores captions for a picture, and describes the picture if the model can.

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
MOST = 100  # captions

processor = AutoProcessor.from_pretrained(FOLDER, **CODE)
writes = "AutoModelForImageTextToText" in json.loads((FOLDER / "config.json").read_text())["auto_map"]
writer = AutoModelForImageTextToText.from_pretrained(FOLDER, **CODE).eval() if writes else None
model = AutoModel.from_pretrained(FOLDER, **CODE).eval()
compares = hasattr(model, "get_text_features")


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
    return processor.decode_texts(writer.generate(**inputs, num_beams=3, max_new_tokens=20))[0]


pages = {}
if compares:
    captions = gr.Textbox(lines=4, label="Captions, one per line", value="a cat\na dog\na rocket")
    pages["Score captions"] = gr.Interface(
        score, [gr.Image(type="pil", label="Picture"), captions],
        gr.Label(num_top_classes=10, label="Probability"), flagging_mode="never",
    )  # fmt: skip
if writes:
    pages["Describe"] = gr.Interface(
        describe, gr.Image(type="pil", label="Picture"), gr.Textbox(label="Caption"), flagging_mode="never"
    )
about = FOLDER.with_name("README.md").read_text(encoding="utf-8").splitlines()
title = next((line[2:] for line in about if line.startswith("# ")), "vlp")
page = gr.TabbedInterface(list(pages.values()), list(pages), title=title)

if __name__ == "__main__":
    page.launch()
