"""What meets the world: sockets, clocks, processes, key files, logs and HTTP. Drives any `Node`, knows no role."""
