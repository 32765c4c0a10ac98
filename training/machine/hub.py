"""Push a folder to the Hub."""

from pathlib import Path

from huggingface_hub import HfApi, get_token

from ...errors import ArgumentError
from ...files import WRITTEN
from ..arguments import TrainingArguments


def check_access() -> None:
    """Raise ArgumentError if there is no token for the Hub; called before training."""
    if get_token() is None:
        raise ArgumentError("--push_to_hub needs a token: run `hf auth login`, or set HF_TOKEN.")


def push(folder: Path, arguments: TrainingArguments) -> str:
    """Push a folder in one commit.

    Args:
        folder: folder with the model, its processor and its card.
        arguments: options that name the repository and the branch.

    Returns:
        The URL of the commit.

    Raises:
        OSError: if the push fails; the folder is kept, so that it can be pushed again.
    """
    api = HfApi()
    try:
        name = api.create_repo(arguments.hub_model_id, private=arguments.hub_private, exist_ok=True).repo_id
        if arguments.hub_revision:
            api.create_branch(name, branch=arguments.hub_revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=arguments.hub_revision,
            ignore_patterns=[WRITTEN],
            commit_message=f"Upload {folder.name}, trained with vlp",
        )
    except Exception as error:
        raise OSError(
            f"Could not push to {arguments.hub_model_id}: {error} The model is complete in {folder}; push it again "
            f"with `hf upload {arguments.hub_model_id} {folder}`."
        ) from error
    return commit.commit_url
