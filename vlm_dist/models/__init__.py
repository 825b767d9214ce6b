"""Loading, adapting, running and saving models."""
