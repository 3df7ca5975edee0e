"""A conversation with whoever sits at a terminal."""

import signal
from collections.abc import Callable

from dmc_jax import commands
from dmc_jax.errors import UserError
from dmc_jax.serving.conversation import Conversation, cache_in_words

HELP = """/bytes   what the cache holds, beside a dense one
/reset   begin anew
/quit    leave, as Ctrl-D does; Ctrl-C stops a reply"""


def converse(
    conversation: Conversation, read: Callable[[], str], write: Callable[[str], object]
) -> None:
    """Answer what is read until it ends or says so.

    Args:
        conversation: to go on with.
        read: gives the next line; raises EOFError where there is none.
        write: shows a part of a text.

    Raises:
        KeyboardInterrupt: SIGTERM or SIGHUP came during a reply; its argument is the signal.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n(/quit leaves)\n")
            continue
        try:
            if line == "/quit":
                return
            if line == "/reset":
                conversation.reset()
                write("(what was said is forgotten)\n")
            elif line == "/bytes":
                write(f"({cache_in_words(conversation)})\n")
            elif line.startswith("/"):
                write(f"{HELP}\n")
            elif line:
                _answer(conversation, line, write)
        except UserError as error:
            write(f"({error}; /reset forgets what was said)\n")


def _answer(conversation: Conversation, line: str, write: Callable[[str], object]) -> None:
    # Between two steps only: an interrupt in the middle of one can get lost in JAX's callbacks.
    with commands.stop_requests("ending this reply") as asked:
        reply, noted = conversation.say(line), False
        try:
            for part in reply:
                if conversation.note and not noted:
                    noted = True
                    write(f"({conversation.note})\n")
                write(part)
                if asked:
                    break
        except KeyboardInterrupt:  # the second Ctrl-C, which is for this reply too
            pass
        reply.close()
    write(" (stopped)\n" if asked else "\n")
    if any(number != signal.SIGINT for number in asked):
        raise KeyboardInterrupt(next(n for n in asked if n != signal.SIGINT))
