"""The messages of the orchestration API, by version. Needs protobuf; `import kvstore` does not."""

import os

# Before gRPC is loaded: what it does at forks crashes children that never call it. We do not call
# it in children (`connection.inherited`).
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
