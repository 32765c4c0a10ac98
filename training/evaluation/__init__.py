"""Evaluate models: tasks, metrics and results."""
