"""Saving and pushing models and processors together with the package's code."""

import importlib


class PublishesCode:
    """Mixin that adds the option `bundle` to `save_pretrained` and `push_to_hub`."""

    _publish_code = False

    def save_pretrained(self, save_directory, *args, bundle: bool = False, **kwargs):
        """Save as transformers does.

        Args:
            save_directory: the folder.
            bundle: also save the package's code, so that `trust_remote_code=True` loads the folder where vlp is not
                installed.
            args, kwargs: options of transformers' `save_pretrained`.

        Raises:
            ImportError: if `bundle` is set and vlp is not installed.
        """
        result = super().save_pretrained(save_directory, *args, **kwargs)
        if bundle or self._publish_code:  # import by name: bundled code does not include the bundler
            importlib.import_module("vlp.modeling_vlp.exchange.bundle").add_code(save_directory)
        return result

    def push_to_hub(self, repo_id: str, *, bundle: bool = False, **kwargs) -> str:
        """Push to the hub as transformers does.

        Args:
            repo_id: name of the repository.
            bundle: as for `save_pretrained`.
            kwargs: options of transformers' `push_to_hub`.
        """
        self._publish_code = bundle
        try:
            return super().push_to_hub(repo_id, **kwargs)
        finally:
            self._publish_code = False
