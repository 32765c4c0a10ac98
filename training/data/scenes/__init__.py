"""Scenes: drawn pictures of a few objects with captions, questions, statements and swapped captions.

`--dataset_name scenes` needs no download. A scene is made from its seed alone, so there can be any number of them.
"""

from .rows import is_scenes, load_scenes

__all__ = ["is_scenes", "load_scenes"]
