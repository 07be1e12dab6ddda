"""The messages of the orchestration API, by version. Needs protobuf; `import kvstore` does not."""
