"""What a role wears as a process of its own."""
