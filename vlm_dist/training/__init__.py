"""The training loop and what it turns."""
