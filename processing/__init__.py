"""Preprocessing: prepare images, captions and prompts for a model."""
