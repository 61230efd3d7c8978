"""The studies: the same comparison, made by anyone with one command."""
