"""What test_all.py takes in beside its own tests: the programs, data, FID, the engine, and the evidence."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: these networks are tiny, threads would wait
