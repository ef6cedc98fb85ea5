"""What test_all.py takes in beside its own tests: the programs, data, FID, the engine, and the evidence."""
