"""vlp: pre-train, fine-tune and publish vision-language models inside the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes and pipelines.
"""

import os

# How long OpenMP's threads spin while they wait for each other, which torch's OpenMP reads when torch is imported. With
# its own value, a step on cores that other programs use takes several times as long; alone, vlp's value costs nothing
# (benchmarks/busy.py). A user's own settings are kept.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from . import architectures  # noqa: E402
from .architectures import *  # noqa: E402, F403
from .architectures import __all__ as __all__  # noqa: E402

__version__ = "0.1.0"

architectures.register()
