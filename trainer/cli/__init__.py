"""The command line: flags, help, and repeating what was run. No torch here."""
