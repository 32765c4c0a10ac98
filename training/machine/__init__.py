"""The machine: processes, memory, optimiser, checkpoints and the Hub."""
