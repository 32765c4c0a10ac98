"""The parts of a run that each family of models has of its own."""
