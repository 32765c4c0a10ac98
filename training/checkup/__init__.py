"""The check-up of a data set before training: what is wrong with it, and how to train on it."""
