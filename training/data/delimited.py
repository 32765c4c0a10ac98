"""Read CSV and TSV files as other people write them: any separator, with or without a header, stray quotes included.

Python's `csv` module trusts a file: one stray quote swallows rows, and a comma in a caption that is not quoted cuts it.
Here every line of the file ends up in a row.
"""

import csv
import re
from collections.abc import Iterator

from ...processing.pictures import extensions

SEPARATORS = (",", "\t", ";", "|")
SAMPLE = 50  # lines that the separator is found from
LONGEST = 100  # lines of a row; a quote that is not closed by then is taken as it is
LISTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # a text in a list that was saved as text

# Names that columns commonly have, best first. They are used if there is no column of the default name.
IMAGE_NAMES = (
    "image", "file_name", "filename", "filepath", "file_path", "image_path", "image_name", "image_file", "img",
    "img_path", "path", "file", "picture", "photo", "url", "image_url", "img_url",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "text", "title", "comment", "sentence", "raw", "description", "alt_text", "alt", "label",
    "question",
)  # fmt: skip


def read_delimited(text: str, tabs_first: bool, image_column: str, caption_column: str) -> list[dict]:
    """Read the rows of a table whose fields are separated by commas, tabs, semicolons or bars.

    Args:
        text: content of the file.
        tabs_first: prefer tabs if several separators are possible.
        image_column: name of the image column; also given to it if the table has no header.
        caption_column: likewise the caption column, or several, joined by commas; the field that is put together again
            if a row has too many.

    Returns:
        The rows. A row with too few fields has None in the last columns.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    separators = ("\t", *(mark for mark in SEPARATORS if mark != "\t")) if tabs_first else SEPARATORS
    separator = max(separators, key=lambda mark: fit_of(lines, mark, image_column))  # the first of equals
    records = assembled(lines, separator)
    first = next(records, None)
    if first is None:
        return []
    wanted = caption_column.split(",")
    names = [name.strip() for name in first]
    if is_header(names, (image_column, *wanted)):
        body = list(records)
    else:
        body = [first, *records]
        names = names_without_header(body, image_column, wanted[0])
    caption = index_of(names, (*wanted, *CAPTION_NAMES), len(names) - 1)
    rows = [dict(zip(names, with_length(fields, len(names), caption, separator), strict=True)) for fields in body]
    return unnumbered(rows, names[index_of(names, (image_column, *IMAGE_NAMES), 0)])


def is_picture(text: str) -> bool:
    """Whether a text looks like the path of a picture or a URL. Flickr30k's paths end in the number of the caption."""
    text = text.strip()
    if re.match(r"https?://\S+$", text):
        return True
    ending = re.search(r"(\.\w+)(#\d+)?$", text)
    return bool(ending) and ending[1].lower() in extensions()


def is_header(names: list[str], wanted: tuple[str, ...]) -> bool:
    """Whether the first row holds names of columns: it has a known one, or nothing in it looks like a picture."""
    known = {*wanted, *IMAGE_NAMES, *CAPTION_NAMES}
    return any(name.lower() in known for name in names) or not any(is_picture(name) for name in names)


def fit_of(lines: list[str], separator: str, image_column: str) -> tuple:
    """How well a separator fits the first lines; larger is better.

    Returns:
        Whether there are several fields and one is a picture, or is known as its column; the share of lines that have
        as many fields as the first one; and the number of fields.
    """
    records = [fields_of(line, separator) for line in lines[:SAMPLE] if line.strip()]
    if not records:
        return (False, 0.0, 0)
    width = len(records[0])
    same = sum(len(record) == width for record in records) / len(records)
    known = {image_column, *IMAGE_NAMES}
    found = any(field.strip().lower() in known or is_picture(field) for field in records[0])
    return (width > 1 and found, width > 1, same, width)


def fields_of(line: str, separator: str) -> list[str]:
    """The fields of one line; if its quotes are wrong, they are taken as they are."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True), [""])
    except csv.Error:
        return line.split(separator)


def assembled(lines: list[str], separator: str) -> Iterator[list[str]]:
    """Yield the fields of each row. A row is several lines long only where quotes say so, and rightly.

    Args:
        lines: lines of the file; empty ones between rows are left out.
        separator: what separates the fields.
    """
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if not line.strip():
            continue
        if '"' not in line:
            yield line.split(separator)
            continue
        fields, last = quoted_row(lines, number - 1, separator)
        yield fields
        number = last + 1


def quoted_row(lines: list[str], first: int, separator: str) -> tuple[list[str], int]:
    """The fields of a row that has quotes, and the number of its last line."""
    literal = lines[first].split(separator)
    for last in range(first, min(first + LONGEST, len(lines))):
        try:
            fields = next(csv.reader(["\n".join(lines[first : last + 1])], delimiter=separator, strict=True))
        except csv.Error as error:
            if "end of data" in str(error):  # the quote is still open
                continue
            return literal, first
        except StopIteration:
            return literal, first
        swallowed = any(is_row(line, separator) for line in lines[first + 1 : last + 1])
        return (literal, first) if swallowed else (fields, last)
    return literal, first


def is_row(line: str, separator: str) -> bool:
    """Whether a line looks like a row of its own: one of its several fields is a picture."""
    fields = line.split(separator)
    return len(fields) > 1 and any(is_picture(field.strip().strip('"')) for field in fields)


def with_length(fields: list[str], length: int, caption: int, separator: str) -> list[str | None]:
    """The fields of a row of a table with `length` columns; too many are joined again in the caption."""
    extra = len(fields) - length
    if extra > 0 and not any(fields[length:]):  # empty fields at the end, as spreadsheets write them
        return fields[:length]
    if extra > 0:
        joined = separator.join(fields[caption : caption + extra + 1])
        fields = [*fields[:caption], joined, *fields[caption + extra + 1 :]]
    return [*fields, *[None] * (length - len(fields))]


def names_without_header(records: list[list[str]], image_column: str, caption_column: str) -> list[str]:
    """Name the columns of a table without a header: the image is what looks like one, the caption the longest text."""
    some = records[:SAMPLE]
    width = min(max(len(record) for record in some), len(records[0]))
    pictures = [sum(is_picture(record[column]) for record in some if column < len(record)) for column in range(width)]
    image = max(range(width), key=lambda column: pictures[column])
    letters = [sum(len(record[column]) for record in some if column < len(record)) for column in range(width)]
    others = [column for column in range(width) if column != image]
    caption = max(others, key=lambda column: letters[column], default=None)
    special = {image: image_column, caption: caption_column}
    return [special.get(column, f"column_{column + 1}") for column in range(width)]


def index_of(names: list[str], wanted: tuple[str, ...], otherwise: int) -> int:
    """The index of the first of some names that a table has."""
    lower = [name.lower() for name in names]
    return next((lower.index(name.lower()) for name in wanted if name.lower() in lower), otherwise)


def unnumbered(rows: list[dict], image: str) -> list[dict]:
    """Remove the numbers of the captions that Flickr8k and Flickr30k add to the names of pictures, as in a.jpg#0."""
    if rows and all(re.search(r"\.\w+#\d+$", row[image] or "") for row in rows[:SAMPLE]):
        for row in rows:
            row[image] = re.sub(r"#\d+$", "", row[image] or "")
    return rows


def list_in(text: str | None) -> list[str] | None:
    """The texts of a list that was saved as text, by Python, JSON or NumPy; None if it is none."""
    stripped = (text or "").strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return None
    if LISTED.sub("", stripped[1:-1]).strip(" ,\n\r\t"):
        return None
    return [unquoted(found) for found in LISTED.findall(stripped)]


def unquoted(text: str) -> str:
    """The content of a text in quotes."""
    marks = {"n": "\n", "t": "\t", "r": "\r"}

    def plain(match: re.Match) -> str:
        mark = match[1]
        return chr(int(mark[1:], 16)) if len(mark) > 1 else marks.get(mark, mark)

    return re.sub(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", plain, text[1:-1], flags=re.DOTALL)
