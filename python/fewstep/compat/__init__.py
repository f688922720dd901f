"""Calls of other libraries, taken over: a module for each, which imports it where it needs it."""
