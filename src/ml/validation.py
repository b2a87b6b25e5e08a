"""What pydantic found wrong, in words that a person can act on."""

from pydantic import ValidationError

from ml.errors import UserError

MOST = 5  # problems that are told of one file


def problems(error: ValidationError) -> str:
    """One line: each key and what is wrong with it."""
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:MOST])


def bad_environment(error: ValidationError) -> UserError:
    """Names each bad variable, never its value: it may be a secret."""
    lines = [f"  {str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors()]
    return UserError("The environment has bad variables; correct or unset them:\n" + "\n".join(lines))
