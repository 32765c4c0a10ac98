"""Training: `accelerate launch training clip`."""
