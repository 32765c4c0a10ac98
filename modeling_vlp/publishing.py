"""Saving and pushing with the package's own code, for models and for processors."""

import importlib


class PublishesCode:
    """Mixed in before a class of transformers that is saved and pushed."""

    _publish_code = False

    def save_pretrained(self, save_directory, *args, bundle: bool = False, **kwargs):
        """As transformers'.

        Args:
            bundle: put the package's code into the folder too, for `trust_remote_code=True` where vlp is not installed.

        Raises ImportError where it is asked for, and vlp is not installed.
        """
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if bundle or self._publish_code:  # the bundler is not part of what it puts into a folder
            importlib.import_module("vlp.modeling_vlp.exchange.bundle").add_code(save_directory)
        return result

    def push_to_hub(self, repo_id: str, *, bundle: bool = False, **kwargs) -> str:
        """As transformers'. Args: as `save_pretrained`."""
        self._publish_code = bundle
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._publish_code = False
