"""The commands: one file a group of them, imported only when it is asked for."""
