"""Write the measured figures into the READMEs and the pages in docs/, between their markers, from the stored results.

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
        "models": "| model | languages | parameters | file | minutes | right name, English | right name, Vietnamese |",
        "search": "A text query over {vectors} vectors of {width} dimensions takes **{median} ms** (median of "
        "{queries}; {low} to {high}) on {threads} CPU cores, with {recall} of the ten nearest "
        "found; comparing every vector takes {exact} ms, faiss' `IVF1000,Flat` with as many cells "
        "looked through {faiss} ms, {faiss_recall}. Building the cells took {seconds} s; the index "
        "has {megabytes} MB.",
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
        "models": "| mô hình | ngôn ngữ | tham số | tệp | phút | gọi đúng tên, tiếng Anh | gọi đúng tên, tiếng Việt |",
        "search": "Một truy vấn bằng lời trên {vectors} vector {width} chiều mất **{median} ms** (trung vị "
        "của {queries}; {low} đến {high}) trên {threads} nhân CPU, tìm được {recall} trong mười "
        "vector gần nhất; so với mọi vector mất {exact} ms, `IVF1000,Flat` của faiss với cùng số ô "
        "mất {faiss} ms, {faiss_recall}. Dựng các ô mất {seconds} s; chỉ mục có {megabytes} MB.",
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

DOCUMENTS = (*WORDS, "docs/scaling.md", "docs/evaluation.md")


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


def models_block(words: dict) -> str:
    """The models that come along: their size, and how many of the names of the unseen design are right."""
    lines = [words["models"], "| --- | --- | --- | --- | --- | --- | --- |"]
    for folder in sorted((ROOT / "model_cards").glob("*/results.json")):
        folder = folder.parent
        results = json.loads((folder / "results.json").read_text())
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        told = []
        for file in ("emoji-test-zero-shot.json", "emoji-test-zero-shot-caption_vi.json"):
            path = folder / "evaluations" / file
            found = json.loads(path.read_text()) if path.is_file() else None
            bounds = found and found["intervals"]["zero_shot_top1"]
            value = found and found["metrics"]["zero_shot_top1"]
            told.append(f"{value:.1%} ({bounds[0]:.1%} – {bounds[1]:.1%})".replace("%", " %") if found else "–")
        name, minutes = folder.name, results["training_seconds"] / 60
        languages = results["arguments"]["language"].replace(",", ", ")
        size = f"{results['parameters'] / 1e6:.1f} M | {megabytes:.1f} MB | {minutes:.0f}"
        lines.append(f"| [`{name}`](model_cards/{name}/README.md) | {languages} | {size} | {' | '.join(told)} |")
    return "\n".join(lines)


def search_block(words: dict) -> str:
    """What benchmarks/index_search.py measured, in a sentence."""
    result = json.loads((ROOT / "benchmarks/index_search.json").read_text())
    ways = result["ways"]
    own, exact, faiss = ways["vlp-index"], ways["torch, every vector, float32"], ways["faiss, IVF1000,Flat"]
    return words["search"].format(
        vectors=f"{result['vectors']:,}", width=result["width"], median=own["median_ms"], low=own["range_ms"][0],
        high=own["range_ms"][1], queries=result["queries"], threads=result["threads"],
        recall=f"{100 * own['recall_at_10']:.1f} %", exact=exact["median_ms"], faiss=faiss["median_ms"],
        faiss_recall=f"{100 * faiss['recall_at_10']:.1f} %", seconds=result["build_seconds"],
        megabytes=f"{result['megabytes']:,}",
    )  # fmt: skip


def between(text: str, name: str, content: str) -> str:
    """A text with other content between the markers of a name."""
    block = f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"
    return re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _: block, text, flags=re.DOTALL)


def render(name: str) -> str:
    """A document as it should be."""
    text = (ROOT / name).read_text()
    if name in WORDS:
        words = WORDS[name]
        text = between(between(text, "models", models_block(words)), "search", search_block(words))
        return between(text, "results", results_block(words))
    if name == "docs/evaluation.md":
        return between(text, "search", search_block(WORDS["README.md"]))
    result = json.loads((ROOT / "benchmarks/scaling.json").read_text())
    loss = json.loads((ROOT / "benchmarks/contrastive_loss.json").read_text())
    text = between(text, "memory", scaling.memory_lines(loss))
    return between(between(text, "measured", scaling.measured_table(result)), "plan", scaling.plan_table())


if __name__ == "__main__":
    for name in DOCUMENTS:
        if "--check" not in sys.argv:
            (ROOT / name).write_text(render(name))
        elif render(name) != (ROOT / name).read_text():
            sys.exit(f"{name} does not tell the stored results: run `make readme`.")
