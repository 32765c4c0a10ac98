"""Write the report of a check-up: one page of HTML that opens alone, the same in Markdown, and JSON."""

import base64
import html
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ...errors import printable
from ...model_cards.plots import plot_examples
from ..data.rows import texts_in
from ..data.survey import CheckArguments, thumbnail
from .findings import Findings

FEW = 100  # rows
SHOWN = 7  # examples of each kind
SCRIPT_NAMES = {"LATIN": "Latin", "CJK": "Chinese", "HIRAGANA": "Japanese", "HANGUL": "Korean", "CYRILLIC": "Cyrillic"}


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        text: sentences.
        table: rows of cells, the first of which are the headings; empty for none.
        pictures: (picture or None, text below it); a group of pictures that belong together is a list of these.
        bars: (label, value) of a bar chart.
        is_fault: whether this needs attention.
    """

    title: str
    text: str = ""
    table: list[list[str]] | None = None
    pictures: list[list[tuple[Image.Image | None, str]]] | None = None
    bars: list[tuple[str, float]] | None = None
    is_fault: bool = False


class Gallery:
    """Thumbnails of rows with their captions.

    Args:
        rows: rows of a data set.
        arguments: names of the columns.
    """

    def __init__(self, rows, arguments: CheckArguments):
        self.rows, self.arguments = rows, arguments

    def __getitem__(self, number: int) -> tuple[Image.Image | None, str]:
        row = self.rows[number]
        texts = texts_in(row, self.arguments.caption_column)
        image = thumbnail(row, self.arguments.image_column, self.arguments.max_image_pixels)
        return image, f"row {number:,}: {printable(texts[0], 80) if texts else '(no caption)'}"


def write_report(folder: Path, findings: Findings, sections: list[Section], arguments: CheckArguments) -> None:
    """Write check.html, check.md, check.json and the pictures of the Markdown page into a folder.

    Args:
        folder: an empty folder.
        findings: what was found.
        sections: the parts of the report.
        arguments: the options of the check-up.
    """
    title = (
        f"Check-up of {printable(Path(arguments.dataset_name).name, 80)}, split {printable(arguments.train_split, 40)}"
    )
    (folder / "check.html").write_text(as_html(title, sections), encoding="utf-8", errors="replace")
    (folder / "check.md").write_text(as_markdown(title, sections, folder), encoding="utf-8", errors="replace")
    (folder / "check.json").write_text(findings.as_json(arguments), encoding="utf-8", errors="replace")


# --- what is in it ----------------------------------------------------------------------------------------------------


def sections_of(findings: Findings, rows, eval_rows, arguments: CheckArguments) -> list[Section]:
    """The parts of the report: a summary, the faults, the pictures and captions, and what to choose.

    Args:
        findings: what was found.
        rows: the rows to train on.
        eval_rows: the rows to evaluate on; None if there are none.
        arguments: the options of the check-up.
    """
    own = Gallery(rows, arguments)
    theirs = Gallery(eval_rows, arguments) if eval_rows is not None else None
    parts = [
        unreadable(findings),
        copies(findings, own),
        unreadable_evaluation(findings),
        leaks(findings, own, theirs),
        misfits(findings, own, arguments),
        empty_captions(findings),
    ]
    return [summary(findings, parts, own), *parts, pictures(findings), captions(findings, arguments), advice(findings)]


def summary(findings: Findings, parts: list[Section], own: Gallery) -> Section:
    faults = [part.title for part in parts if part.is_fault]
    text = (
        f"{findings.rows:,} rows, of which {findings.usable:,} can be used; {findings.pictures:,} different pictures "
        f"and {findings.captions.distinct:,} different captions. "
    )
    text += f"Look at: {', '.join(faults)}." if faults else "Nothing is wrong with the data."
    if 0 < findings.usable < FEW:
        text += f" Fewer than {FEW} rows are enough to try the commands, not to train a model."
    step = max(1, findings.rows // SHOWN)
    return Section("Summary", text, pictures=[[own[number]] for number in range(0, findings.rows, step)][:SHOWN])


def unreadable(findings: Findings) -> Section:
    if not findings.unreadable:
        return Section("Unusable rows", "All rows can be used.")
    text = f"Training skips and counts these rows. {findings.advice_for_paths}"
    table = table_of_causes(findings.unreadable, findings.examples, findings.rows)
    return Section("Unusable rows", text, table, is_fault=True)


def table_of_causes(unreadable: dict[str, list[int]], examples: dict[str, str], rows: int) -> list[list[str]]:
    """A table of the causes for which rows cannot be used."""
    table = [["cause", "rows", "share", "the first"]]
    for cause, numbers in sorted(unreadable.items(), key=lambda item: -len(item[1])):
        example = examples.get(cause) or f"row {numbers[0]:,}"
        table.append([cause, f"{len(numbers):,}", share(len(numbers), rows), printable(example, 160)])
    return table


def copies(findings: Findings, own: Gallery) -> Section:
    groups = findings.copies + findings.alike
    if not groups and not findings.alike_to_model:
        return Section("Duplicate pictures", "No picture occurs twice.")
    spare = sum(len(group) - 1 for group in findings.copies)
    alike = sum(len(group) - 1 for group in findings.alike)
    text = (
        f"{spare:,} rows have the same file as an earlier row; {alike:,} more have a picture that looks the same as "
        "another, but is a different file. Several captions of one picture are best one row with a list of captions."
    )
    if findings.alike_to_model:
        text += f" To the model, {len(findings.alike_to_model)} further pairs look almost the same; see the JSON file."
    shown = [[own[number] for number in group[:4]] for group in groups[:SHOWN]]
    return Section("Duplicate pictures", text, pictures=shown, is_fault=bool(groups))


def leaks(findings: Findings, own: Gallery, theirs: Gallery | None) -> Section:
    title = "Leaks into the evaluation"
    if theirs is None:
        return Section(title, "No evaluation data was given (--eval_split, --eval_dataset_name).")
    unreadable = sum(map(len, findings.eval_unreadable.values()))
    read = f"{findings.eval_rows - unreadable:,} pictures to evaluate on{' that can be read' if unreadable else ''}"
    if not findings.leaks:
        found = f"None of the {read} is trained on." if unreadable < findings.eval_rows else "No picture was compared."
        return Section(title, found)
    same = sum(is_same for _, _, is_same in findings.leaks)
    text = (
        f"{len(findings.leaks):,} of the {read} are also trained on: {same:,} are the same file, "
        f"{len(findings.leaks) - same:,} look the same. Results on them say little. Left: the row to train on; right: "
        "the row to evaluate on."
    )
    shown = [[own[one], theirs[other]] for one, other, _ in findings.leaks[:SHOWN]]
    return Section(title, text, pictures=shown, is_fault=True)


def unreadable_evaluation(findings: Findings) -> Section:
    title = "Unreadable pictures to evaluate on"
    if not findings.eval_unreadable:
        return Section(title, "There are none.")
    table = table_of_causes(findings.eval_unreadable, findings.eval_examples, findings.eval_rows)
    text = "The evaluation leaves them out, and whether they are trained on is not known. "
    return Section(title, (text + findings.advice_for_eval_paths).strip(), table, is_fault=True)


def misfits(findings: Findings, own: Gallery, arguments: CheckArguments) -> Section:
    title = "Captions that do not fit"
    if not arguments.model:
        return Section(title, "Give a --model, such as a trained CLIP, to find pairs that do not fit.")
    if not findings.misfits:
        return Section(title, "The model finds no caption that fits its picture far worse than another one.")
    text = (
        f"According to the model, {len(findings.misfits):,} pairs fit at least a hundred times worse than the picture "
        "with the caption of another row: perhaps these captions are wrong. The worst first:"
    )
    table = [["row", "caption", "fits better", "odds"]]
    table += [
        [f"{each.row:,}", printable(each.caption, 80), printable(each.better, 80), f"{each.odds:.0e}"]
        for each in findings.misfits[:SHOWN]
    ]
    return Section(title, text, table, [[own[each.row]] for each in findings.misfits[:SHOWN]], is_fault=True)


def empty_captions(findings: Findings) -> Section:
    facts, title = findings.captions, "Captions that say nothing"
    table = [["kind", "captions", "share", "examples"]]
    for kind, found in sorted(facts.empty.items(), key=lambda item: -len(item[1])):
        examples = ", ".join(printable(text, 60) for text in dict.fromkeys(text for _, text in found[:20]))
        table.append([kind, f"{len(found):,}", share(len(found), facts.count), printable(examples, 200)])
    if len(table) == 1:
        return Section(title, "None was found.")
    return Section(title, "These captions name no content, or contain markup.", table, is_fault=True)


def pictures(findings: Findings) -> Section:
    if not findings.sizes:
        return Section("Pictures", "None can be read.")
    table = [["", "smallest", "1 %", "median", "99 %", "largest"]]
    table += [[name, *(f"{value:g}" for value in values)] for name, values in findings.sizes.items()]
    text = "Formats: " + ", ".join(f"{name or 'unknown'} {count:,}" for name, count in findings.formats.items())
    counts = Counter(side_class(side) for side in findings.sides)
    bars = [(f"{size:,}", counts[size]) for size in sorted(counts)]
    return Section("Pictures", f"{text}. Shorter sides in pixels, rounded down to a power of two:", table, bars=bars)


def side_class(side: int) -> int:
    return 1 << (max(1, side).bit_length() - 1)


def captions(findings: Findings, arguments: CheckArguments) -> Section:
    facts = findings.captions
    if not facts.count:
        return Section("Captions", "There is none.")
    several = ", ".join(f"{count:,} rows with {number}" for number, count in list(facts.per_picture.items())[:8])
    text = (
        f"{facts.count:,} captions, {facts.distinct:,} of them different ({several}). Tokens: median "
        f"{facts.tokens['median']}, 99 % have at most {facts.tokens['99 %']}, the longest has {facts.tokens['most']}; "
        f"{facts.cut:,} ({share(facts.cut, facts.count)}) are cut at --max_length {arguments.max_length}. "
    )
    text += (
        "Scripts: "
        + ", ".join(f"{SCRIPT_NAMES.get(n, n.capitalize())} {share(c, facts.count)}" for n, c in facts.scripts.items())
        + ". "
    )
    text += "Languages, as far as frequent words tell: " + ", ".join(
        f"{name} {share(count, facts.count)}" for name, count in list(facts.languages.items())[:6]
    )
    text += "."
    table = [["repeated caption", "rows"]] + [[printable(text, 100), f"{count:,}"] for text, count in facts.repeated]
    if facts.variants:
        shown = "; ".join(" / ".join(printable(each, 40) for each in group[:3]) for group in facts.variants[:3])
        text += f" {len(facts.variants):,} captions occur in several spellings, such as {shown}."
    counts = Counter({})
    for tokens, count in facts.histogram.items():
        counts[min(tokens // 4 * 4, 80)] += count
    bars = [(f"{tokens}–{tokens + 3}" if tokens < 80 else "80+", counts[tokens]) for tokens in sorted(counts)]
    return Section("Captions", text, table if len(table) > 1 else None, bars=bars)


def advice(findings: Findings) -> Section:
    chosen = findings.advice
    text = " ".join(chosen.reasons) + (f" {chosen.measured}" if chosen.measured else "")
    return Section("What to choose", text, [["command"], [chosen.command], [chosen.blip_command]])


def share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"


# --- the files --------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid #d1d9e0; padding-top: 1rem; }
h2.fault::before { content: "!"; background: #bc4c00; color: white; border-radius: 50%; padding: 0 .55em; margin-right: .5em; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
th { color: #59636e; font-weight: 600; } td { border-top: 1px solid #eaeef2; overflow-wrap: anywhere; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; } .group { display: flex; gap: .4rem; background: #f6f8fa; padding: .5rem; border-radius: 6px; }
figure { margin: 0; width: 104px; font-size: .72rem; line-height: 1.3; overflow-wrap: anywhere; } figure img { max-width: 96px; display: block; }
.bar { display: flex; align-items: center; font-size: .8rem; } .bar span { width: 5.5rem; color: #59636e; } .bar i { background: #0969da; height: .8rem; margin-right: .5rem; }
""".strip()  # noqa: E501


def as_html(title: str, sections: list[Section]) -> str:
    """The report as a page without links to other files."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for section in sections:
        mark = ' class="fault"' if section.is_fault else ""
        parts += [f"<h2{mark}>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.text)}</p>"]
        if section.table:
            head, *body = section.table
            cells = ["".join(f"<th>{html.escape(cell)}</th>" for cell in head)]
            cells += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in body]
            parts.append("<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        if section.bars:
            most = max(value for _, value in section.bars) or 1
            parts += [
                f'<div class="bar"><span>{html.escape(label)}</span>'
                f'<i style="width:{24 * value / most:.2f}rem"></i>{value:,}</div>'
                for label, value in section.bars
            ]
        if section.pictures:
            groups = ["".join(map(figure, group)) for group in section.pictures]
            parts.append('<div class="gallery">' + "".join(f'<div class="group">{g}</div>' for g in groups) + "</div>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    return f"<!doctype html><html><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"


def figure(entry: tuple[Image.Image | None, str]) -> str:
    image, text = entry
    content = ""
    if image is not None:
        file = io.BytesIO()
        image.save(file, "WEBP", quality=80)
        content = f'<img alt="" src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'
    return f"<figure>{content}<figcaption>{html.escape(text)}</figcaption></figure>"


def as_markdown(title: str, sections: list[Section], folder: Path) -> str:
    """The report as Markdown; its pictures are written into the folder."""
    lines = [f"# {title}", ""]
    for number, section in enumerate(sections):
        lines += [f"## {'⚠ ' if section.is_fault else ''}{section.title}", "", section.text, ""]
        if section.table:
            head, *body = [[cell.replace("|", "\\|") for cell in row] for row in section.table]
            lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
            lines += [f"| {' | '.join(row)} |" for row in body] + [""]
        entries = [entry for group in section.pictures or [] for entry in group if entry[0] is not None]
        if entries:
            examples = [{"image": image, "label": text, "predictions": []} for image, text in entries]
            plot_examples(examples, folder / f"pictures-{number}.png")
            lines += [f"![{section.title}](pictures-{number}.png)", ""]
    return "\n".join(lines)
