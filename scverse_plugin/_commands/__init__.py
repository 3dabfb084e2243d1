"""The commands of the plugin, which the shell of the recipe finds by the entry-point group ``cello1.commands``."""
