"""Statements of edited facts among the batches of a training, and batches that contradict them."""
