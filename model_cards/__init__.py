"""What is published: a model card rendered from the facts of a run."""
