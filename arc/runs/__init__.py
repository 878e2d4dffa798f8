"""What surrounds a run: settings, artifacts, checkpoints, signals, processes, needs and troubles of the machine."""
