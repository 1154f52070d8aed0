"""The driver of virtual time: hosts, the network between them, and what goes wrong with both."""
