"""The live driver: sockets, the real clock, HTTP."""
