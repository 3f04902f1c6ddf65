"""Verbs that are not training, one file each."""
