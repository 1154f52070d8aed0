"""Runs of a whole fleet, live and in virtual time, and their command line."""
