"""Placement policies, one file each, found by listing this folder."""
