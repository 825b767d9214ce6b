"""What a training run will need, counted before it starts: the real model's code runs on tensors that have a shape and no data."""
