"""How messages become signed datagrams."""
