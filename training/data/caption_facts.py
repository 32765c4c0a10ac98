"""Statistics of captions: lengths, scripts, languages, repetitions, and captions that say nothing."""

import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "HEBREW", "DEVANAGARI", "THAI",
           "GREEK", "BENGALI", "TAMIL", "GEORGIAN", "ARMENIAN")  # fmt: skip
# Frequent short words that tell languages in Latin script apart; a caption counts for the one with most of them.
LANGUAGES = {
    "English": "the a an of and in on with is at to by for two his her",
    "German": "der die das und ein eine einen mit auf im ist von dem den zwei vor",
    "French": "le la les un une des et dans sur avec est du au deux devant",
    "Spanish": "el los las una unos y en con es del al por dos sobre",
    "Italian": "il lo gli una di e con su nel della è due sul",
    "Portuguese": "o os as um uma e em com de do da no na dois",
    "Dutch": "de het een en van op met is in aan twee naar voor",
    "Vietnamese": "một và của trên với là người các trong đang có hai",
    "Polish": "i w na z jest się do dwa przez",
    "Turkish": "bir ve ile bu da iki üzerinde",
    "Indonesian": "yang di dan dengan sebuah seorang dua pada",
    "Swedish": "en ett och på med i är av två som",
}
VIETNAMESE = frozenset("ơưđạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủứừửữựỳỵỷỹ")
WORDS = {language: frozenset(words.split()) for language, words in LANGUAGES.items()}
OTHERS = {"HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean", "CJK": "Chinese", "ARABIC": "Arabic",
          "HEBREW": "Hebrew", "DEVANAGARI": "Hindi", "THAI": "Thai", "GREEK": "Greek", "CYRILLIC": "in Cyrillic script",
          "BENGALI": "Bengali", "TAMIL": "Tamil", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian"}  # fmt: skip
GENERIC = frozenset(
    "image picture photo photograph img untitled none null na n/a caption test unknown placeholder".split()
)
EMPTY = (
    ("an address", re.compile(r"^(https?://|www\.)\S+$")),
    (
        "the name of a file",
        re.compile(r"^\S+\.(jpe?g|png|webp|gif|tiff?|bmp)$|^(img|dsc|dscn|image|photo|screenshot)[-_ ]?\d+$"),
    ),
    ("no letter", re.compile(r"^[\W\d_]*$")),
)
REMAINS = ("markup", re.compile(r"</?\w+[^>]*>|&(amp|lt|gt|quot|nbsp|#\d+);"))
SHOWN = 10


@dataclass
class CaptionFacts:
    """What is known of all captions of a data set.

    Attributes:
        count: number of captions.
        distinct: number of different captions.
        per_picture: number of captions of a picture, and how many pictures have as many.
        tokens: quantiles of the number of tokens: "median", "99 %", "most".
        cut: captions with more tokens than training uses.
        scripts, languages: number of captions by name.
        empty: by kind, captions that say nothing, (row, caption).
        repeated: the captions that most rows share, (caption, number of rows).
        variants: groups of captions that differ by case, spaces or a final full stop only.
    """

    count: int = 0
    distinct: int = 0
    per_picture: dict[int, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict)
    cut: int = 0
    scripts: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    empty: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    repeated: list[tuple[str, int]] = field(default_factory=list)
    variants: list[list[str]] = field(default_factory=list)


def caption_facts(captions: list[list[str]], lengths: dict[str, int], max_length: int) -> CaptionFacts:
    """Count.

    Args:
        captions: the captions of each row.
        lengths: the number of tokens of each distinct caption.
        max_length: number of tokens that training uses.
    """
    flat = [text for texts in captions for text in texts]
    counts = Counter(flat)
    facts = CaptionFacts(count=len(flat), distinct=len(counts))
    facts.per_picture = dict(sorted(Counter(map(len, captions)).items()))
    if flat:
        tokens = np.array([lengths[text] for text in flat])
        facts.tokens = {
            "median": int(np.median(tokens)),
            "99 %": int(np.quantile(tokens, 0.99)),
            "most": int(tokens.max()),
        }
        facts.histogram = dict(sorted(Counter(tokens.tolist()).items()))
        facts.cut = int((tokens > max_length).sum())
    scripts: Counter = Counter()
    languages: Counter = Counter()
    for text, count in counts.items():
        script = script_of(text)
        scripts[script] += count
        languages[language_of(text, script)] += count
    facts.scripts, facts.languages = dict(scripts.most_common()), dict(languages.most_common())
    for row, texts in enumerate(captions):
        for text in texts:
            if kind := emptiness(text):
                facts.empty.setdefault(kind, []).append((row, text))
    facts.repeated = [(text, count) for text, count in counts.most_common(SHOWN) if count > 1]
    facts.variants = variants_of(counts)
    return facts


def emptiness(text: str) -> str | None:
    """What is wrong with a caption that says nothing about its picture; None if nothing is."""
    lower = text.strip().lower()
    if lower.strip(".") in GENERIC:
        return "a word for any picture"
    return next((kind for kind, pattern in (*EMPTY, REMAINS) if pattern.search(lower)), None)


def script_of(text: str) -> str:
    """The script of most letters of a text, such as "LATIN"; "none" without letters."""
    counts: Counter = Counter()
    for letter in text[:200]:
        if letter.isalpha():
            name = "LATIN" if letter.isascii() else unicodedata.name(letter, "OTHER").split()[0]
            counts[name if name in SCRIPTS else "other"] += 1
    if counts.get("HIRAGANA") or counts.get("KATAKANA"):  # Japanese also uses Chinese characters
        return "HIRAGANA"
    return counts.most_common(1)[0][0] if counts else "none"


def language_of(text: str, script: str) -> str:
    """The language of a caption, as far as frequent words tell; "not clear" if they do not."""
    if script == "LATIN" and VIETNAMESE & set(text.lower()):
        return "Vietnamese"
    if script != "LATIN":
        return OTHERS.get(script, "not clear")
    found = Counter()
    for word in re.findall(r"[^\W\d_]+", text.lower()):
        for language, words in WORDS.items():
            found[language] += word in words
    best = found.most_common(2)
    return best[0][0] if best and best[0][1] > (best[1][1] if len(best) > 1 else 0) else "not clear"


def variants_of(counts: Counter) -> list[list[str]]:
    """Groups of captions that differ by case, spaces or a final full stop only, the most frequent ones first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for text in counts:
        groups[" ".join(text.casefold().split()).rstrip(" .!")].append(text)
    several = [sorted(group, key=lambda text: -counts[text]) for key, group in groups.items() if key and len(group) > 1]
    return sorted(several, key=lambda group: -sum(counts[text] for text in group))
