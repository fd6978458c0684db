"""Read the texts of records from JSON lines, Parquet and Arrow files."""
