"""Checkpoints: their form on disk, an engine as tensors and back, saving beside the training, mirrors."""
