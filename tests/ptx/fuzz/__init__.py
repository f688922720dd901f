"""Random problems, counts and mutants, for the interpreter."""
