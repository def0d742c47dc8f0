"""Experiment 6: latency of every setting at batch 1. The same as `budgetvlm profile latency`."""

import sys

from budgetvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "latency", *sys.argv[1:]]))
