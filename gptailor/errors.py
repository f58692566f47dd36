"""The one exception that a person is meant to read: what is wrong, where, and what would be right."""


class UserError(ValueError):
    """A mistake in what was asked (a file, a name, a value). Its text is shown as it is, without a traceback."""
