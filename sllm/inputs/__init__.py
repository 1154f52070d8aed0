"""Reading what people write: TOML files, and folders of Python files."""
