"""Reuse of text that is no prefix: what is asked, where pieces stand, which rows are computed.

No engine and no torch in here; connectors load, rotate and compute.
"""
