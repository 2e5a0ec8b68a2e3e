"""A stand-in for a real language model: its corpus from WordNet, and what editing does to a model trained on it."""
