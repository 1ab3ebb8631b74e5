"""The base of all errors that are the user's to mend."""


class InputError(ValueError):
    """Wrong input: a setting, a file, a checkpoint. The message names it, its value, and what would be right."""
