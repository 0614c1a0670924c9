"""What dictionaries refuse with."""


class DictionaryError(ValueError):
    """A dictionary that cannot be read, reproduced or used as asked; the message names the offender and what to do."""
