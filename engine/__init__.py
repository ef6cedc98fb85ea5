"""What lets a run take days: options, checkpoints, processes, random numbers. See README.md."""
