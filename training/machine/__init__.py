"""Hardware, optimiser, sharding, LoRA adapters, training states and the Hub."""
