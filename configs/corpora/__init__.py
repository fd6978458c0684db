"""What `data.paths` names: files, folders and globs, and the index of prepared tokens. Start reading at `paths.py`."""
