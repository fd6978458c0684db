"""`trellax describe` and `trellax inspect` with --serve: an engine that serves the model of a config."""
