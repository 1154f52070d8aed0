"""A client's requests: the states of one, and the workers that have them."""
