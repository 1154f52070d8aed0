"""The workers known to a node: who they are, what they said, and what was sent to them since."""
