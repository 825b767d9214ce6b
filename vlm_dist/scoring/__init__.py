"""Answers on held-out samples, compared with the truth."""
