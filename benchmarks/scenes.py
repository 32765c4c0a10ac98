"""What is reached on scenes without seeing them: chance, the most frequent answer, and a model of the text alone.

    python benchmarks/scenes.py

The model of the text gives, for a question or a statement, the most frequent answer that the training split has to the
same words; where it has none, that to the most similar words (nearest neighbour by word counts). It is evaluated on the
test split, and the results are written to scenes.json.
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.neighbors import NearestNeighbors
from vlp.training.data.scenes import load_scenes

RESULTS = Path(__file__).with_suffix(".json")


def by_words(train: list[tuple[str, str]], test: list[str]) -> list[str]:
    """The answers of the model of the text.

    Args:
        train: texts and their answers.
        test: texts.

    Returns:
        An answer for each text of `test`.
    """
    known = defaultdict(Counter)
    for text, answer in train:
        known[text][answer] += 1
    texts = sorted(known)
    words = CountVectorizer(token_pattern=r"\w+", ngram_range=(1, 2))
    nearest = NearestNeighbors(n_neighbors=1).fit(words.fit_transform(texts))
    _, found = nearest.kneighbors(words.transform(test))
    return [known[text if text in known else texts[number]].most_common(1)[0][0]
            for text, number in zip(test, found[:, 0], strict=True)]  # fmt: skip


def baselines(train: list[tuple[str, str]], test: list[tuple[str, str, str]]) -> dict:
    """The accuracy of each baseline, in all and for each kind of text.

    Args:
        train: texts and their answers.
        test: texts, their answers and their kinds.
    """
    answers, kinds = [answer for _, answer, _ in test], [kind for _, _, kind in test]
    most = Counter(answer for _, answer in train).most_common(1)[0][0]
    said = {
        "most frequent answer": [most] * len(test),
        "text alone": by_words(train, [text for text, _, _ in test]),
    }
    result = {"chance": float(np.mean([1 / len({a for _, a, k in test if k == kind}) for kind in kinds]))}
    for name, found in said.items():
        hits = [one == other for one, other in zip(found, answers, strict=True)]
        groups = {kind: float(np.mean([hit for hit, each in zip(hits, kinds, strict=True) if each == kind]))
                  for kind in sorted(set(kinds))}  # fmt: skip
        result[name] = {"accuracy": float(np.mean(hits)), "groups": groups}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    results = {}
    train, test = (load_scenes("scenes", "questions", split).remove_columns("image") for split in ("train", "test"))
    results["questions"] = baselines(
        [(row["question"], row["answers"][0]) for row in train],
        [(row["question"], row["answers"][0], row["kind"]) for row in test],
    )
    train, test = (
        load_scenes("scenes", "statements", split).remove_columns(["image", "second_image"])
        for split in ("train", "test")
    )
    results["statements"] = baselines(
        [(row["sentence"], str(row["label"])) for row in train],
        [(row["sentence"], str(row["label"]), " ".join(row["sentence"].split()[:2])) for row in test],
    )
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
