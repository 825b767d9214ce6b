"""Looking before training: the machine, the configuration, what the model will be fed."""
