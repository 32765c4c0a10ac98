"""Render the stored results into the READMEs and the pages in docs/, between their markers.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

import features
import scaling
import simulate
from table import table

ROOT = Path(__file__).parents[1]
SEARCH = (
    "On {threads} CPU cores, a text query over {vectors} vectors of {width} dimensions takes "
    "**{median} ms** (median of {queries} queries; {low} to {high}) and finds {recall} of the ten nearest. "
    "Comparing every vector takes {exact} ms. Building the index took {seconds} s, without embedding; it "
    "takes up {megabytes} MB."
)
HEAD = "| `{name}` | value (95 % interval) |"
ROWS = {
    "zero_shot_top1": "zero-shot top-1, {classes} names",
    "zero_shot_top5": "zero-shot top-5",
    "text_to_image_recall_at_1": "text to image, R@1",
    "image_to_text_recall_at_1": "image to text, R@1",
    "text_to_image_recall_at_10": "text to image, R@10",
    "reranked_text_to_image_recall_at_1": "text to image, R@1, re-ranked by ITM",
    "reranked_image_to_text_recall_at_1": "image to text, R@1, re-ranked by ITM",
    "reranked_lm_text_to_image_recall_at_1": "text to image, R@1, re-ranked by captioning",
    "reranked_lm_image_to_text_recall_at_1": "image to text, R@1, re-ranked by captioning",
    "composition_accuracy": "true caption first, by similarity",
    "composition_accuracy_itm": "true caption first, by matching (ITM)",
    "itm_accuracy": "ITM accuracy on pairs and their hardest wrong captions",
    "caption_exact": "captions identical to the name",
    "bleu_4": "captions, BLEU-4",
    "cider": "captions, CIDEr",
}
WORDS = {
    "README.md": {
        "language": "en",
        "models": "| model | languages | parameters | file size | minutes "
        "| top-1, English (95 % interval) | top-1, Vietnamese |",
        "train": (
            "`make train` trains for {steps} steps on any machine. Of {classes} names, the model then chooses the "
            "right one for {mean} of the drawings of an artist whose work it never saw (mean of {seeds} seeds, "
            "{low} to {high}; chance is 0.05 %). Training alone took:",
            "| machine, with nothing else running | precision | minutes |",
            {"no": "float32"},
        ),
        "composition": (
            "| | true caption first (95 % interval) | colours swapped | objects swapped |",
            "by similarity",
            "by matching (ITM)",
        ),
    },
    "README.vi.md": {
        "language": "vi",
        "models": "| mô hình | ngôn ngữ | tham số | dung lượng | phút "
        "| top-1, tiếng Anh (khoảng tin cậy 95 %) | top-1, tiếng Việt |",
        "train": (
            "`make train` huấn luyện {steps} bước trên mọi máy. Sau đó, trong {classes} tên, mô hình chọn đúng tên cho "
            "{mean} hình vẽ của một hoạ sĩ mà nó chưa từng thấy (trung bình của {seeds} seed, từ {low} đến {high}; "
            "chọn ngẫu nhiên: 0,05 %). Riêng phần huấn luyện mất:",
            "| máy, không chạy gì khác | độ chính xác số | phút |",
            {"no": "float32"},
        ),
        "composition": (
            "| | chú thích đúng đứng trước (khoảng tin cậy 95 %) | tráo màu | tráo vật |",
            "theo độ tương đồng",
            "theo ghép cặp (ITM)",
        ),
    },
}

DOCUMENTS = (
    *WORDS, "docs/scaling.md", "docs/evaluation.md", "docs/towers.md", "docs/scenes.md", "docs/results.md",
    "docs/training.md",
)  # fmt: skip


def results_block() -> str:
    """The tables of the metrics of the included English models, from their evaluations, and the table of timings."""
    lines = []
    for name in ("clip-emoji", "blip-emoji", "blip2-emoji"):
        folder = ROOT / "model_cards" / name
        lines += [HEAD.format(name=name), "| --- | --- |"]
        values, bounds, classes = {}, {}, None
        for task in ("zero-shot", "retrieval", "itm", "captioning"):
            path = folder / "evaluations" / f"emoji-test-{task}.json"
            if path.is_file():
                found = json.loads(path.read_text())
                values, bounds = values | found["metrics"], bounds | found["intervals"]
                classes = classes or found["classes"]
        for metric, title in ROWS.items():
            if metric in values:
                unit = "" if metric == "cider" else " %"
                title = title.format(classes=f"{classes:,}" if classes else "")
                lines.append(f"| {title} | {with_interval(values[metric], bounds[metric], unit)} |")
        lines.append("")
    lines.append(table())
    return "\n".join(lines)


def models_block(words: dict) -> str:
    """The table of the included models: their size and their top-1 accuracy on the unseen design."""
    lines = [words["models"], "| --- | --- | --- | --- | --- | --- | --- |"]
    for folder in sorted((ROOT / "model_cards").glob("*/results.json")):
        folder = folder.parent
        results = json.loads((folder / "results.json").read_text())
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        cells = []
        for file in ("emoji-test-zero-shot.json", "emoji-test-zero-shot-caption_vi.json"):
            path = folder / "evaluations" / file
            found = json.loads(path.read_text()) if path.is_file() else None
            bounds = found and found["intervals"]["zero_shot_top1"]
            value = found and found["metrics"]["zero_shot_top1"]
            cells.append(f"{value:.1%} ({bounds[0]:.1%} – {bounds[1]:.1%})".replace("%", " %") if found else "–")
        name, minutes = folder.name, results["training_seconds"] / 60
        languages = results["arguments"]["language"].replace(",", ", ")
        size = f"{results['parameters'] / 1e6:.1f} M | {megabytes:.1f} MB | {minutes:.0f}"
        lines.append(f"| [`{name}`](model_cards/{name}/README.md) | {languages} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def train_block(words: dict) -> str:
    """What `make train` reaches over several seeds, and how long it takes on machines where nothing else runs."""
    known = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())["clip-emoji"]
    top1, runs = known["summary"]["zero_shot_top1"], list(known["seeds"].values())
    sentence, head, precisions = words["train"]
    lines = [
        sentence.format(
            steps=f"{runs[0]['steps']:,}", classes=f"{runs[0]['classes']:,}", mean=percent(top1["mean"]),
            low=percent(top1["min"], ""), high=percent(top1["max"]), seeds=len(runs),
        ),
        "",
        head,
        "| --- | --- | --- |",
    ]  # fmt: skip
    for run in json.loads((ROOT / "benchmarks/train_time.json").read_text()):
        minutes = f"{run['seconds'] / 60:.1f}"
        lines.append(f"| {run['hardware']} | {precisions.get(run['precision'], run['precision'])} | {minutes} |")
    return "\n".join(lines)


def optimizers_block() -> str:
    """The table of the results of benchmarks/optimizers.py."""
    stored = json.loads((ROOT / "benchmarks/optimizers.json").read_text())
    lines = [
        "| recipe, steps | `--optimizer` | `--learning_rate` | text to image, R@1 | image to text, R@1 "
        "| zero-shot top-1 | captions identical to the name |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    metrics = ("text_to_image_recall_at_1", "image_to_text_recall_at_1", "zero_shot_top1", "caption_exact")
    for run in stored["runs"]:
        cells = " | ".join(percent(run["metrics"][name]) if name in run["metrics"] else "–" for name in metrics)
        lines.append(
            f"| `{run['recipe']}`, {run['steps']:,} | {run['optimizer']} | {run['learning_rate']:g} | {cells} |"
        )
    return "\n".join(lines)


def search_block() -> str:
    """The paragraph about the results of benchmarks/index_search.py."""
    result = json.loads((ROOT / "benchmarks/index_search.json").read_text())
    own, exact = result["ways"]["vlp index"], result["ways"]["torch, every vector, float32"]
    return SEARCH.format(
        vectors=f"{result['vectors']:,}", width=result["width"], median=own["median_ms"], low=own["range_ms"][0],
        high=own["range_ms"][1], queries=result["queries"], threads=result["threads"],
        recall=percent(own["recall_at_10"]), exact=exact["median_ms"], seconds=result["build_seconds"],
        megabytes=f"{result['megabytes']:,}",
    )  # fmt: skip


def towers_block() -> str:
    """The tables of the results of `make train-towers` and `make train-blip-towers` over several seeds."""
    known = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())
    return "\n\n".join(seeds_table(name) for name in sorted(name for name in known if name.endswith("-towers")))


def seeds_table(name: str) -> str:
    """The table of the results of a recipe over several seeds."""
    known = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())[name]
    seeds, summary = known["seeds"], known["summary"]
    first = next(iter(seeds.values()))
    hardware = " or ".join({run["hardware"].replace("1 CPU cores", "1 CPU core"): None for run in seeds.values()})
    precision = " or ".join({run["precision"].replace("no", "float32"): None for run in seeds.values()})
    unseen = "combinations of shape, colour and texture" if "scenes" in name else "design"
    lines = [
        f"`{name}`, {len(seeds)} seed{'s' * (len(seeds) > 1)}, {first['steps']:,} steps of training on "
        f"{hardware} in {precision}, on the {unseen} that training never saw:",
        "",
        "| metric | mean | lowest | highest |",
        "| --- | --- | --- | --- |",
    ]
    for metric, title in ROWS.items():
        if metric in summary:
            unit = "" if metric == "cider" else " %"
            cells = [percent(summary[metric][part], unit) for part in ("mean", "min", "max")]
            lines.append(f"| {title.format(classes=format(first['classes'] or 0, ','))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def scenes_block() -> str:
    """The tables of what models reach on scenes, and of what is reached without looking at them."""
    blind = json.loads((ROOT / "benchmarks/scenes.json").read_text())
    lines = [
        "| | chance | most frequent answer | text alone | BLIP (95 % interval) | BLIP-2 (95 % interval) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for part, models, file, metric in (
        ("questions", ("blip-scenes-vqa", "blip2-scenes-vqa"), "scenes-test-vqa-question.json", "vqa_accuracy"),
        ("statements", ("blip-scenes-nlvr",), "scenes-test-nlvr-sentence.json", "nlvr_accuracy"),
    ):
        found = [json.loads((ROOT / "model_cards" / model / "evaluations" / file).read_text()) for model in models]
        guesses = [blind[part][way] for way in ("most frequent answer", "text alone")]
        cells = [percent(blind[part]["chance"]), *(percent(way["accuracy"]) for way in guesses)]
        cells += [with_interval(each["metrics"][metric], each["intervals"][metric]) for each in found]
        lines.append(f"| {part} | {' | '.join(cells)} |{' |' * (2 - len(models))}")
        for kind, values in found[0]["groups"].items():
            cells = [*(percent(way["groups"][kind]) for way in guesses), percent(values[metric])]
            lines.append(f"| … {kind} | | {' | '.join(cells)} | |")
    tables = composition_block(WORDS["README.md"]), seeds_table("blip-scenes")
    return "\n\n".join(["\n".join(lines), scenes_seeds(), *tables])


def scenes_seeds() -> str:
    """A sentence about the accuracy of the models of several seeds."""
    stored = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())
    parts = []
    for config, metric, what in (("blip-scenes-vqa", "vqa_accuracy", "questions"),
                                 ("blip-scenes-nlvr", "nlvr_accuracy", "statements"),
                                 ("blip2-scenes-vqa", "vqa_accuracy", "questions by BLIP-2")):  # fmt: skip
        runs = stored[config]["seeds"]
        found = ", ".join(percent(run["metrics"][metric]) for run in runs.values())
        steps = format(next(iter(runs.values()))["steps"], ",")
        parts.append(f"{found} of the {what} after {steps} steps (seeds {', '.join(runs)})")
    return (
        f"Training depends on the seed: {'; '.join(parts)}. BLIP's runs start from the same `blip-scenes`, and each "
        "run on statements from the run on questions of the same seed; BLIP-2's include stage 1. The models of "
        "`blip-scenes` in the last table start from the captioner that `make cards` trains."
    )


def composition_block(words: dict) -> str:
    """The table of how often models prefer a true caption to one with swapped words."""
    title, similarity, itm = words["composition"]
    lines = [title, "| --- | --- | --- | --- |"]
    for name, result in json.loads((ROOT / "benchmarks/composition.json").read_text()).items():
        for metric, way in (("composition_accuracy", similarity), ("composition_accuracy_itm", itm)):
            if metric in result["metrics"]:
                cells = [with_interval(result["metrics"][metric], result["intervals"][metric])]
                cells += [percent(result["groups"][kind][metric]) for kind in ("colours", "order")]
                lines.append(f"| `{name}`, {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def features_block(language: str) -> str:
    """The table of the features that benchmarks/features.py found in each library."""
    stored = json.loads((ROOT / "benchmarks/features.json").read_text())
    heads = [f"{library} {facts['version']}" for library, facts in stored.items()]
    lines = [f"| | {' | '.join(heads)} |", "| --- " + "| :-: " * len(heads) + "|"]
    for english, vietnamese, _ in features.PROBES:
        cells = ["✓" if facts["features"].get(english) else "–" for facts in stored.values()]
        lines.append(f"| {english if language == 'en' else vietnamese} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(share: float, unit: str = " %") -> str:
    return f"{100 * share:.1f}{unit}"


def with_interval(share: float, bounds: list[float], unit: str = " %") -> str:
    """A share and the bounds of its interval, in per cent."""
    low, high = bounds
    return f"{percent(share, unit)} ({percent(low, '')} – {percent(high, '')})"


def loading_block() -> str:
    """The table of the results of benchmarks/data.py."""
    stored = json.loads((ROOT / "benchmarks/data.json").read_text())
    names = list(next(iter(stored["sizes"].values()))["samples_per_second"])
    lines = [
        f"| JPEG | {' | '.join(names)} | vlp, compared with open_clip | difference | memory of vlp, of open_clip |"
    ]
    lines += ["| --- " * (len(names) + 4) + "|"]
    for size, result in stored["sizes"].items():
        speeds = result["samples_per_second"]
        cells = [f"{speeds[name]:.0f}" for name in names]
        cells += [f"{speeds['vlp'] / speeds['open_clip']:.1f} times", f"{result['difference']:.2f} of 255"]
        memory = [f"{result['megabytes'][name]:,.0f} MB" for name in ("vlp", "open_clip")]
        lines.append(f"| {size} | {' | '.join(cells)} | {', '.join(memory)} |")
    training = stored["training"]
    runs = training["runs"]
    fast, exact = runs["vlp"], runs["decoded in full"]
    ratio = fast["samples_per_second"] / exact["samples_per_second"]
    lines += [
        "",
        "The difference is the mean absolute one from the pixels of the picture decoded in full; memory includes "
        f"that of the libraries. Of two runs of {training['steps']:,} steps on JPEGs of 512 x 512 pixels, alike but "
        f"for the decoding, the faster one processes {ratio:.1f} times as many samples a second; their losses are "
        f"{fast['loss']:.2f} and {exact['loss']:.2f}, their top-1 {percent(fast['top1'])} and "
        f"{percent(exact['top1'])}.",
    ]
    return "\n".join(lines)


def between(text: str, name: str, content: str) -> str:
    """Replace the content between the markers `<!-- name -->` and `<!-- end of name -->`."""
    block = f"<!-- {name} -->\n{content}\n<!-- end of {name} -->"
    return re.sub(rf"<!-- {name} -->.*<!-- end of {name} -->", lambda _: block, text, flags=re.DOTALL)


def render(name: str) -> str:
    """The text of a document with the stored results in it."""
    text = (ROOT / name).read_text()
    if name in WORDS:
        words = WORDS[name]
        text = between(between(text, "models", models_block(words)), "composition", composition_block(words))
        text = between(between(text, "train", train_block(words)), "speed", table(words["language"], short=True))
        return between(text, "features", features_block(words["language"]))
    if name == "docs/results.md":
        seeds = "\n\n".join(map(seeds_table, ("blip-emoji", "blip2-emoji-2")))
        return between(between(text, "results", results_block()), "seeds", seeds)
    if name == "docs/training.md":
        return between(text, "muon", optimizers_block())
    if name == "docs/towers.md":
        return between(text, "results", towers_block())
    if name == "docs/scenes.md":
        return between(text, "results", scenes_block())
    if name == "docs/evaluation.md":
        return between(text, "search", search_block())
    result = json.loads((ROOT / "benchmarks/scaling.json").read_text())
    loss = json.loads((ROOT / "benchmarks/contrastive_loss.json").read_text())
    text = between(text, "memory", scaling.memory_lines(loss))
    text = between(text, "loading", loading_block())
    text = between(between(text, "measured", scaling.measured_table(result)), "plan", scaling.plan_table())
    simulated = json.loads((ROOT / "benchmarks/simulate.json").read_text())
    text = between(text, "simulation checked", simulate.check_table(simulated))
    return between(text, "simulation", simulate.gpu_table(simulated))


if __name__ == "__main__":
    for name in DOCUMENTS:
        if "--check" not in sys.argv:
            (ROOT / name).write_text(render(name))
        elif render(name) != (ROOT / name).read_text():
            sys.exit(f"{name} does not match the stored results: run `make readme`.")
