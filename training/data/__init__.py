"""Load image-text pairs and turn them into batches."""
