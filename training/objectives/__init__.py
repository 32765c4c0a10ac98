"""What is optimised: one nn.Module for each objective, from a batch to named losses."""
