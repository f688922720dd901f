"""What several test files share. Tests import from here and never from each other."""
