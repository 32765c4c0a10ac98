"""Linear probes: logistic regression on frozen features, with its regularisation chosen on a validation split.

Source: Radford et al., 2021 (CLIP, arXiv:2103.00020), appendix A.3: scikit-learn's L-BFGS with at most 1,000
iterations; the strength is searched between 1e-6 and 1e6, in eight steps per decade, by halving the interval around the
best value; the classifier is then fitted to the training and validation data.
"""

import random
import warnings
from collections import defaultdict

import numpy as np

from ...errors import ArgumentError

# Shapes: N pictures, D width of the features, K classes

ITERATIONS = 1000
DECADES = 6  # the search covers 10^-6 to 10^6
STEPS = 8  # candidates per decade
WITHOUT_VALIDATION = 0.316  # scikit-learn's C in the README of openai/CLIP
VALIDATION_SHARE = 0.2  # of the training split, if the data has no validation split
MOST_VALIDATION_SHOTS = 4  # pictures of each class to choose the strength with, as in CoOp (arXiv:2109.01134)


def fit(features: np.ndarray, labels: np.ndarray, strength: float):
    """Fit a classifier.

    Args:
        features: (N, D).
        labels: (N,) class indices, of at least two classes.
        strength: inverse of the L2 regularisation, scikit-learn's C.

    Returns:
        The fitted LogisticRegression.

    Raises:
        ArgumentError: if scikit-learn is not installed, or there is only one class.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ArgumentError('Linear probes need scikit-learn: pip install "vlp[probe]".') from None
    if len(np.unique(labels)) < 2:
        raise ArgumentError("A linear probe needs training pictures of at least two classes.")
    classifier = LogisticRegression(C=strength, max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # as in the paper, the iterations are limited
        return classifier.fit(features, labels)


def scores_of(classifier, features: np.ndarray, classes: int) -> np.ndarray:
    """The scores (N, K) of all classes; minus infinity for classes that the classifier has not seen."""
    known = classifier.decision_function(features)
    if known.ndim == 1:  # scikit-learn gives two classes one score
        known = np.stack([-known, known], axis=1)
    scores = np.full((len(features), classes), -np.inf)
    scores[:, classifier.classes_] = known
    return scores


def accuracy(classifier, features: np.ndarray, labels: np.ndarray) -> float:
    """The share of pictures (0 to 1) whose class is predicted."""
    return float((classifier.predict(features) == labels).mean())


def choose_strength(train: tuple[np.ndarray, np.ndarray], validation: tuple[np.ndarray, np.ndarray]) -> float:
    """Search for the strength with the best accuracy on validation data; of equally good ones, the smallest.

    Args:
        train, validation: features (N, D) and labels (N,); without validation data, the strength is WITHOUT_VALIDATION.

    Returns:
        scikit-learn's C.
    """
    if not len(validation[1]):
        return WITHOUT_VALIDATION
    known: dict[int, float] = {}  # accuracy by the exponent of the strength, in steps

    def measure(step: int) -> float:
        if step not in known:
            known[step] = accuracy(fit(*train, 10 ** (step / STEPS)), *validation)
        return known[step]

    width, most = 2 * STEPS, DECADES * STEPS
    for step in range(-most, most + 1, width):
        measure(step)
    while width > 1:
        width //= 2
        best = min(step for step, value in known.items() if value == max(known.values()))
        for step in (best - width, best + width):
            if -most <= step <= most:
                measure(step)
    return 10 ** (min(step for step, value in known.items() if value == max(known.values())) / STEPS)


def split_off(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide pictures at random, class by class, so that each class keeps at least one picture.

    Args:
        labels: (N,).
        share: share of each class (0 to 1) that is split off.
        seed: seed of the choice.

    Returns:
        The indices that are kept, and those that are split off.
    """
    kept, off = [], []
    for members in by_class(labels, seed).values():
        count = min(round(share * len(members)), len(members) - 1)
        off += members[:count]
        kept += members[count:]
    return np.array(sorted(kept), dtype=int), np.array(sorted(off), dtype=int)


def draw_shots(labels: np.ndarray, shots: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw pictures of each class to train on, and others to choose the strength with.

    Args:
        labels: (N,).
        shots: pictures of each class to train on; all of a class that has fewer.
        seed: seed of the draw.

    Returns:
        The indices to train on, and at most min(shots, 4) others of each class, as far as there are any.
    """
    train, validation = [], []
    for members in by_class(labels, seed).values():
        train += members[:shots]
        validation += members[shots : shots + min(shots, MOST_VALIDATION_SHOTS)]
    return np.array(train, dtype=int), np.array(validation, dtype=int)


def by_class(labels: np.ndarray, seed: int) -> dict[int, list[int]]:
    """The indices of each class, in a random order."""
    members = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)
    shuffled = random.Random(seed)
    for label in sorted(members):
        shuffled.shuffle(members[label])
    return dict(sorted(members.items()))
