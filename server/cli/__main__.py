"""`python -m kvstore.server.cli`: the command line."""

from kvstore.server.cli.main import main

main()
