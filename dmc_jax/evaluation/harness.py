"""A model of ours as lm-evaluation-harness asks for one: any checkpoint, policy and gates.

The library makes requests and counts what comes of them; `harness_tasks` has its tasks. Here the
requests are met: known answers are scored by `answers`, through the policy, and new ones come from
who writes, which is the engine. Texts become tokens, and long ones are cut, as the library's own
backend `hf` does for a model of Hugging Face, so that the figures of an equal model are equal.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from absl import logging
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dmc_jax.config import ModelConfig
from dmc_jax.core.attention import CausalAttention, causal_attention
from dmc_jax.data.chat import load_chat_template
from dmc_jax.data.tokenizer import Tokenizer, encode_document, encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.evaluation.answers import score_answers
from dmc_jax.policies.policy import Policy

_NEW_TOKENS = 256  # that a task without a limit of its own lets a model write, as `hf` has it


class Written(Protocol):
    """What became of a prompt, such as `inference.requests.Result`."""

    tokens: tuple[int, ...]  # new ones, without EOS
    prompt_tokens: int
    ratio: float | None  # tokens per slot


# Continues prompts of token ids, each by its fields of `inference.sampling.SamplingParams`: yields
# the number of a prompt and what became of it, in any order.
Write = Callable[
    [Sequence[Sequence[int]], Sequence[Mapping[str, Any]]], Iterator[tuple[int, Written]]
]


class HarnessModel(TemplateLM):
    """A model as the library asks for it; `lm_eval.evaluate` takes it too."""

    def __init__(
        self,
        params: Any,
        config: ModelConfig,
        tokenizer: Tokenizer,
        policy: Policy,
        *,
        write: Write,
        tokenizer_path: Path,
        batch: int = 1,
        max_length: int | None = None,
        dtype: str = "float32",
        attention: CausalAttention = causal_attention,
    ):
        """Take a model and what its rows keep.

        Args:
            params: of the model, as `init_params` gives them.
            config: its sizes.
            tokenizer: of the texts.
            policy: what the rows keep.
            write: continues prompts, by the same model and policy.
            tokenizer_path: the tokenizer's file, beside which a chat template may lie.
            batch: sequences at a time whose answers are known.
            max_length: tokens of a text and its answer at most; None: what the model knows.
            dtype: of the forward pass.
            attention: what computes it; see `model.causal_attention`.
        """
        super().__init__()
        self._model = {"params": params, "config": config, "policy": policy}
        self._how = {"batch": batch, "dtype": dtype, "attention": attention}
        self._text, self._write, self._path = tokenizer, write, tokenizer_path
        self.max_length = config.max_length if max_length is None else max_length
        self._tokens = self._slots = 0.0

    @property
    def tokens_per_slot(self) -> float:
        """The compression ratio over all sequences so far, each at its end."""
        return self._tokens / self._slots if self._slots else 1.0

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return self._text.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes an answer without a question."""
        return self._text.bos_id if self._text.bos_id >= 0 else self._text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Say which tokenizer it is."""
        return str(self._path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text, in which the name of a special token means that token.

        Args:
            string: the text.
            add_special_tokens: False: without BOS; None: with BOS where the model has it so and the
                text does not have it already.
            kwargs: none that is known.
        """
        if add_special_tokens is False:
            return self._text.encode_special(string)
        return encode_document(self._text, string, special=True)[:-1]  # but for its EOS

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Make the text of a conversation, by the model's own template.

        Args:
            chat_history: objects with "role" and "content".
            add_generation_prompt: end with what precedes the model's answer; else the last message
                is to be continued.

        Raises:
            UserError: there is no template, or it refuses the conversation.
        """
        render = load_chat_template(self._path, answer_next=add_generation_prompt)
        if render is None:
            raise UserError(
                f"--apply_chat_template: there is none beside the tokenizer in {self._path.parent}:"
                " expected chat_template.jinja, or chat_template in tokenizer_config.json"
            )
        try:
            text = render(chat_history)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise UserError(f"--apply_chat_template: {error}") from None
            logging.log_first_n(
                logging.WARNING, "%s; what the role system says is left out", 1, error
            )
            return self.apply_chat_template(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last.lstrip() if last.lstrip() in text else last.strip()
        return text[: text.rindex(last) + len(last)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Measure whole texts, in windows that share no token.

        Args:
            requests: a text each.
            disable_tqdm: show no progress.

        Returns:
            The log-likelihood of each, in nats.
        """
        windows, owners = [], []
        for number, request in enumerate(requests):
            [text] = request.args
            split = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(("", text), *make_disjoint_window(window)) for window in split]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (nats, _) in zip(owners, found, strict=True):
            totals[number] += nats
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts.

        Args:
            requests: a text each, and how to continue it.
            disable_tqdm: show no progress.

        Returns:
            The new texts, each up to where it was to stop.

        Raises:
            UserError: a way to continue that the engine does not have, or no room for the new
                tokens.
        """
        prompts, params = [], []
        for number, request in enumerate(requests):
            text, wanted = request.args
            # The same text may be asked for several times: every time another draw.
            params.append(_sampling(request.task_name, wanted, seed=number))
            room = self.max_length - params[-1]["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"task {request.task_name} lets the model write {self.max_length - room} "
                    f"tokens, and it knows texts of {self.max_length}: there is no room for a "
                    "question"
                )
            prompts.append(encode_prompt(self._text, text, special=True)[-room:])
        texts = [""] * len(requests)
        made = self._write(prompts, params)
        for number, result in tqdm(made, "writing", len(requests), disable=disable_tqdm):
            texts[number] = self._text.decode(result.tokens)
            for stop in params[number]["stop"]:
                texts[number] = texts[number].split(stop)[0]
            if result.ratio is not None:
                tokens = result.prompt_tokens + len(result.tokens) - 1
                self._count(tokens, tokens / result.ratio)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Measure known answers: the log-likelihood, and whether the model would say it."""
        prompts, answers = [], []
        for (_, text), prompt, answer in requests:
            if not (prompt and 0 < len(answer) <= self.max_length):
                raise UserError(
                    f"the answer {text[:60]!r} has {len(answer)} tokens after {len(prompt)}: "
                    f"expected 1 to {self.max_length} after one or more"
                )
            # Its last token is not read, so there is room for one more.
            prompts.append([*prompt, *answer][-self.max_length - 1 :][: -len(answer)])
            answers.append(answer)
        with tqdm(desc="reading", total=len(requests), disable=disable_tqdm) as bar:
            scored = score_answers(
                **self._model, prompts=prompts, answers=answers, **self._how, report=bar.update
            )
        for prompt, answer, each in zip(prompts, answers, scored, strict=True):
            self._count(len(prompt) + len(answer) - 1, each.slots)
        return [(-float(each.nats.sum()), bool(each.first.all())) for each in scored]

    def _count(self, tokens: int, slots: float) -> None:
        self._tokens, self._slots = self._tokens + tokens, self._slots + slots


def _sampling(task: str, wanted: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Fields of `SamplingParams` from a task's `generation_kwargs`."""
    wanted = dict(normalize_gen_kwargs(dict(wanted), _NEW_TOKENS))
    wanted.pop("do_sample")  # it has become the temperature
    params = {
        "max_new_tokens": wanted.pop("max_gen_toks"),
        "temperature": float(wanted.pop("temperature", 0.0)),
        "stop": tuple(stop for stop in wanted.pop("until") if stop),
        "seed": seed,
    }
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if name in wanted:
            params[name] = wanted.pop(name)
    wanted = {name: value for name, value in wanted.items() if (name, value) != ("num_beams", 1)}
    if wanted:
        raise UserError(
            f"task {task}: its generation_kwargs have {', '.join(wanted)}, which the engine does "
            f"not know; it knows {', '.join(params)}, top_k, top_p, min_p and repetition_penalty"
        )
    return params
