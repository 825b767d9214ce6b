"""The `vlm-dist` command: one short file a subcommand, no logic here."""
