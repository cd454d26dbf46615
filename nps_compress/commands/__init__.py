"""Commands that cli.py takes in, and what commands share."""
