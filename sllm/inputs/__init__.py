"""Reading files that people write: TOML files, and folders of Python files."""
