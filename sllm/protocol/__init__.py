"""What is said between roles, and what every role is made of; no input or output, no clock."""
