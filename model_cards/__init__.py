"""Model cards, rendered from the stored facts of a training run."""
