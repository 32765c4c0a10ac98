"""vlp: pre-train, fine-tune and publish vision-language models inside the Hugging Face ecosystem.

Importing the package registers its models with transformers' Auto classes and pipelines.
"""

from . import architectures
from .architectures import *  # noqa: F403
from .architectures import __all__ as __all__

__version__ = "0.1.0"

architectures.register()
