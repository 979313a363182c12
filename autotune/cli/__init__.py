"""The command line: one file a command, which parses, calls and prints. Modules with a leading underscore are glue."""
