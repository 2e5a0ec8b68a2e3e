"""Access to the experts, routers and layers of transformers' MoE models."""
