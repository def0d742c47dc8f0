"""Experiment 5: accuracy of every setting on every sample. The same as `budgetvlm profile accuracy`."""

import sys

from budgetvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", "accuracy", *sys.argv[1:]]))
