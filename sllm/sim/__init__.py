"""Virtual time: the roles of a live run, driven deterministically, with the faults one asks for and checkers watching."""
