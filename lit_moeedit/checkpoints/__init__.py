"""Checkpoints: reading them as nothing but data, and exporting them in the format of the hub."""
