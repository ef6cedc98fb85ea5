"""What test_all.py takes in beside its own tests: the programs, data, FID, the engine, and the evidence."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: these networks are tiny, threads would wait


def pytest_configure(config):
    """Loads the fixtures where tests run: with -n in the workers, not in the process that waits for them."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
