"""What goes in: images, captions and prompts, made ready for a model."""
