"""The command-line programs beside training and evaluation."""
