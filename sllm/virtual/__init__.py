"""The driver of virtual time: hosts, the network between them, and the faults of both."""
