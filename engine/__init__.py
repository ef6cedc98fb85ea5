"""What lets a run take days: options, run directory, checkpoints, processes, random numbers. See README.md.
"""
