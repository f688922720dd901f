"""Training from a shell. `registry` lists the methods, and each has a file of its own."""
