"""How a model learns: `accelerate launch training clip`."""
