"""The messages between roles, and the parts that every role is made of. Nothing here reads a clock, a socket or a file."""
