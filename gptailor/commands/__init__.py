"""What only the command line calls, one file a command that needs more than a few lines."""
