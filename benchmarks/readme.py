"""Write the measured figures into the READMEs and docs/scaling.md, between their markers, from the stored results.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

import scaling
from table import table

ROOT = Path(__file__).parents[1]
WORDS = {
    "README.md": {
        "language": "en",
        "head": "| {minutes} minutes on {hardware}, mean of {seeds} seeds (lowest to highest) | {title} |",
        "hardware": "2 CPU cores",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} names",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "text to image, R@1",
            "image_to_text_recall_at_1": "image to text, R@1",
            "text_to_image_recall_at_10": "text to image, R@10",
            "reranked_text_to_image_recall_at_1": "text to image, R@1, re-ranked by ITM",
            "reranked_image_to_text_recall_at_1": "image to text, R@1, re-ranked by ITM",
            "itm_accuracy": "ITM accuracy on pairs and their hardest wrong captions",
            "caption_exact": "captions that are exactly the name",
            "bleu_4": "captions, BLEU-4",
            "cider": "captions, CIDEr",
        },
    },
    "README.vi.md": {
        "language": "vi",
        "head": "| {minutes} phút trên {hardware}, trung bình của {seeds} seed (thấp nhất đến cao nhất) | {title} |",
        "hardware": "2 nhân CPU",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} tên",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "văn bản sang ảnh, R@1",
            "image_to_text_recall_at_1": "ảnh sang văn bản, R@1",
            "text_to_image_recall_at_10": "văn bản sang ảnh, R@10",
            "reranked_text_to_image_recall_at_1": "văn bản sang ảnh, R@1, xếp lại bằng ITM",
            "reranked_image_to_text_recall_at_1": "ảnh sang văn bản, R@1, xếp lại bằng ITM",
            "itm_accuracy": "độ chính xác ITM trên các cặp đúng và chú thích sai khó nhất",
            "caption_exact": "chú thích trùng khớp với tên",
            "bleu_4": "chú thích, BLEU-4",
            "cider": "chú thích, CIDEr",
        },
    },
}


def results_block(words: dict) -> str:
    seeds = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())
    lines = []
    for config, result in seeds.items():
        runs = result["seeds"]
        minutes = round(max(run["training_seconds"] for run in runs.values()) / 60)
        head = words["head"].format(minutes=minutes, hardware=words["hardware"], seeds=len(runs), title=f"`{config}`")
        lines += [head, "| --- | --- |"]
        for name, title in words["rows"].items():
            if name not in result["summary"]:
                continue
            value, classes = result["summary"][name], next(iter(runs.values()))["classes"]
            unit = "" if name == "cider" else " %"
            span = f"{100 * value['min']:.1f} – {100 * value['max']:.1f}"
            title = title.format(classes=f"{classes:,}" if classes else "")
            lines.append(f"| {title} | {100 * value['mean']:.1f}{unit} ({span}) |")
        lines.append("")
    lines.append(table(words["language"]))
    return "\n".join(lines)


def between(text: str, name: str, content: str) -> str:
    """A text with other content between the markers of a name."""
    block = f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"
    return re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _: block, text, flags=re.DOTALL)


def render(name: str) -> str:
    """A document as it should be."""
    text = (ROOT / name).read_text()
    if name in WORDS:
        return between(text, "results", results_block(WORDS[name]))
    result = json.loads((ROOT / "benchmarks/scaling.json").read_text())
    loss = json.loads((ROOT / "benchmarks/contrastive_loss.json").read_text())
    text = between(text, "memory", scaling.memory_lines(loss))
    return between(between(text, "measured", scaling.measured_table(result)), "plan", scaling.plan_table())


if __name__ == "__main__":
    for name in (*WORDS, "docs/scaling.md"):
        if "--check" not in sys.argv:
            (ROOT / name).write_text(render(name))
        elif render(name) != (ROOT / name).read_text():
            sys.exit(f"{name} does not tell the stored results: run `make readme`.")
