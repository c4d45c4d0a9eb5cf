"""Bridges to other people's tools; each imports its tool, and none is imported by the rest of the package."""
