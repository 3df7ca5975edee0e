"""Turns of a conversation are those of fresh readings, and what the cache holds is not read."""

import signal

import pytest

from dmc_jax.errors import UserError
from dmc_jax.inference import programs
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.inference.snapshot import Snapshot
from dmc_jax.serving.conversation import Conversation, cache_in_words
from dmc_jax.serving.terminal import converse
from tests.serving.live import make_engine

PARAMS = SamplingParams(5, temperature=1.0, seed=3)


@pytest.fixture
def begins(monkeypatch):
    """From which token on each pass over a prompt reads."""
    read, found = programs.read_prompts, []

    def recorded(*args, **options):
        found.extend(begin for _, begin in args[3])
        return read(*args, **options)

    monkeypatch.setattr(programs, "read_prompts", recorded)
    return found


@pytest.fixture(scope="module")
def engine(tiny):
    return make_engine(tiny)


def turns_go_on_from_what_is_held_and_say_what_a_fresh_reading_says_test(tiny, engine, begins):
    talk = Conversation(engine, tiny.render, PARAMS, system="b")
    asked, ids, held = ["ab", "b"], [], 0
    assert cache_in_words(talk) == "nothing is in the cache yet"
    for turn, text in enumerate(asked):
        reply = "".join(talk.say(text))
        [begin] = begins
        assert talk.note is None and (begin == 0) == (turn == 0)
        system = "<s>s b</s>" if turn == 0 else "</s>"
        ids += tiny.tokenizer.encode_special(f"{system}<s>u {text}</s><s>a ")
        assert talk.read == len(ids) - begin
        params = SamplingParams(5, temperature=1.0, seed=3 + 2 * turn + 2)  # by what was said
        [expected] = engine.generate([ids], params)
        assert reply == expected.text
        assert begin >= held
        ids += expected.tokens
        held = len(ids) - 1  # the newest token is read with what follows
        begins.clear()
    roles = [message["role"] for message in talk.messages]
    assert roles == ["system", *["user", "assistant"] * 2]
    assert f"the last turn read {talk.read} tokens" in cache_in_words(talk)
    assert engine.unfinished == []


def a_reply_that_is_stopped_counts_as_said_test(tiny, engine, begins):
    talk = Conversation(engine, tiny.render, PARAMS)
    whole = list(talk.say("ab"))
    talk.reset()
    reply = talk.say("ab")
    part = next(reply) + next(reply) + next(reply)
    reply.close()
    assert "".join(whole).startswith(part) and len(part) < len("".join(whole))
    # And with it what may be a part of a character, which is not shown before it is certain.
    assert talk.messages[-1]["content"].rstrip("\ufffd") == part.rstrip("\ufffd")
    begins.clear()
    assert list(talk.say("b")) and talk.note is None
    assert begins[0] > 0


def what_cannot_go_on_is_read_again_and_that_is_said_test(tiny, engine, begins, monkeypatch):
    def changing(messages):
        return f"<s>{len(messages)} " + tiny.render(messages)

    talk = Conversation(engine, changing, PARAMS)
    assert list(talk.say("ab")) and talk.note is None
    assert list(talk.say("ab"))
    assert "the chat template changes what was said before" in talk.note

    def refuse(snapshot, prompt):
        raise UserError("policy snapkv cuts a prompt once")

    monkeypatch.setattr(Snapshot, "followed_by", refuse)
    talk = Conversation(engine, tiny.render, PARAMS)
    assert list(talk.say("ab")) and talk.note is None
    assert list(talk.say("ab"))
    assert talk.note == "read from the beginning: policy snapkv cuts a prompt once"
    assert begins == [0] * 4


def a_conversation_that_is_full_says_so_and_stays_as_it_is_test(tiny, engine):
    talk = Conversation(engine, tiny.render, PARAMS)
    "".join(talk.say("ab"))
    before = list(talk.messages)
    with pytest.raises(UserError, match="there is room for 128"):
        list(talk.say("ab" * 200))
    assert talk.messages == before and "".join(talk.say("b")) and talk.note is None


class Terminal:
    """Lines that are typed and what is shown; signals come at parts of it."""

    def __init__(self, *lines):
        self.lines, self.shown, self.alarms = list(lines), [], {}

    def read(self):
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    def write(self, text):
        self.shown.append(text)
        for number in self.alarms.pop(len(self.shown), ()):
            signal.raise_signal(number)

    @property
    def text(self):
        return "".join(self.shown)


def a_terminal_shows_replies_bytes_and_help_test(tiny, engine):
    talk = Conversation(engine, tiny.render, PARAMS)
    expected = "".join(talk.say("ab"))
    talk.reset()
    terminal = Terminal("ab", "", "/bytes", "/magic", KeyboardInterrupt, "/reset", "/bytes", "ab")
    converse(talk, terminal.read, terminal.write)
    assert terminal.text.startswith(f"{expected}\n(")
    assert "tokens per slot" in terminal.text and "/quit    leave" in terminal.text
    assert "(/quit leaves)" in terminal.text and "(nothing is in the cache yet)" in terminal.text
    assert terminal.text.endswith(f"{expected}\n\n")
    terminal = Terminal("/quit", "ab")
    converse(talk, terminal.read, terminal.write)
    assert terminal.lines == ["ab"]


@pytest.mark.parametrize("times", [1, 2])
def ctrl_c_stops_a_reply_and_not_the_conversation_test(tiny, engine, times):
    talk = Conversation(engine, tiny.render, PARAMS)
    terminal = Terminal("ab", "/bytes", "b")
    terminal.alarms[2] = [signal.SIGINT] * times
    converse(talk, terminal.read, terminal.write)
    assert terminal.text.count(" (stopped)\n") == 1
    assert "tokens per slot" in terminal.text and not terminal.lines
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert len(talk.messages[1]["content"]) < 8


def sigterm_ends_the_conversation_after_a_step_test(tiny, engine):
    terminal = Terminal("ab", "b")
    terminal.alarms[2] = [signal.SIGTERM]
    with pytest.raises(KeyboardInterrupt) as ended:
        converse(Conversation(engine, tiny.render, PARAMS), terminal.read, terminal.write)
    assert ended.value.args == (signal.SIGTERM,) and terminal.lines == ["b"]
