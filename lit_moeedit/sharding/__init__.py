"""Reading and writing parameters."""
