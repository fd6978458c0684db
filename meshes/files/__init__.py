"""Read files from elsewhere without hanging or filling memory, and write our own whole or not at all."""
