"""Tiers of segments: what those have in common that keep one per file or object."""
