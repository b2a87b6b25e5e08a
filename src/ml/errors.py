"""What went wrong, for the person who can mend it."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input or a bad environment. The message says where, what was found, and the remedy."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; a UserError ends the process with its message and exit code 1, without a traceback.

    Any other exception is a fault of this code and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
