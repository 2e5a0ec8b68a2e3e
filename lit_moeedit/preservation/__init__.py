"""What an edit must preserve: second moments of text, and the shaping of keys by them."""
