"""From a question to a placement, over the table of workers."""
