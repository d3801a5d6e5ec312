"""What every command takes: a parser a command, imported without torch so that --help answers at once."""
