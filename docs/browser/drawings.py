"""`python docs/browser/drawings.py`: draw drawings.webp, the pictures that the page can search.

One sheet of 12 x 12 cells of 64 pixels, the red apple first: Twemoji (CC BY 4.0), from the test split of the bundled
data.
"""

from pathlib import Path

from PIL import Image
from vlp.processing.pictures import read_picture
from vlp.training.data.sources import load_rows

SIDE, CELL = 12, 64


def main() -> None:
    rows = load_rows("emoji", "test", "image")
    apple = rows["caption"].index("red apple")
    step = len(rows) // (SIDE * SIDE - 1)
    chosen = [apple, *range(0, len(rows), step)][: SIDE * SIDE]
    sheet = Image.new("RGB", (SIDE * CELL, SIDE * CELL), "white")
    for place, number in enumerate(chosen):
        drawing = read_picture(rows[number]["image"]).resize((CELL, CELL))
        sheet.paste(drawing, (place % SIDE * CELL, place // SIDE * CELL))
    sheet.save(Path(__file__).with_name("drawings.webp"), quality=85, method=6)


if __name__ == "__main__":
    main()
