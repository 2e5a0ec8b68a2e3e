"""What is particular to transformers' MoE models."""
