"""What a coordinator keeps of its workers."""
