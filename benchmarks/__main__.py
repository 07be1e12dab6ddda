"""`python -m kvstore.benchmarks` is `kvstore bench`."""

import sys

from kvstore.server.cli.main import main

if __name__ == "__main__":
    sys.argv[1:1] = ["bench"]
    main()
