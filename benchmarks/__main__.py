"""`python -m kvstore.benchmarks` is `kvstore bench`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    runpy.run_module("kvstore.server.cli", run_name="__main__")
