"""The demo with vLLM: three engines and a restart, and only the first reads the whole document.

Each reader is a vLLM engine of its own with SmolLM2-135M-Instruct and KVStore's connector. The
first reads a long document and saves its KV to a store; the second finds it in memory; then the
store is restarted, and the third is served from disk.

    make demo-vllm

Exit code 1: an answer is not the one given without the store, or nothing was loaded.
"""

from __future__ import annotations

import sys

import demo

if __name__ == "__main__":
    sys.exit(demo.main("demo_vllm_reader.py"))
