"""One module per hardware backend; each imports its package when it is used."""
