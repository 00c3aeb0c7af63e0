"""Training: settings, the trainer, its state, several processes, and the run that ties them together."""
