"""Training objectives: each is an nn.Module that computes named losses from a batch."""
