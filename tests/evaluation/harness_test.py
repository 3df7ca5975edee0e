"""Tasks of lm-evaluation-harness: figures are those of its own backend on the same model."""

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

from dmc_jax.checkpoints.models import load_tokenizer_of, open_model
from dmc_jax.data.tokenizer import encode_prompt
from dmc_jax.errors import UserError
from dmc_jax.evaluation.side_by_side import measure
from dmc_jax.inference.engine import Engine
from dmc_jax.inference.sampling import SamplingParams
from dmc_jax.interop.export import write_huggingface
from dmc_jax.interop.formats import open_source
from dmc_jax.policies.dense import Dense
from dmc_jax.policies.tova import TOVA
from tests.doors import runs_of
from tests.tiny_run import WORDS, save_model

with warnings.catch_warnings():  # of its imports, which are about the future of others
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from dmc_jax.evaluation import harness_tasks
    from dmc_jax.evaluation.harness import HarnessModel
    from dmc_jax.evaluation.harness_tasks import MODEL_CARD, find_tasks, run_tasks

pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 64  # that the model knows: longer questions are cut, longer texts split
TEMPLATE = """{% for m in messages %}<|{{ m.role }}|>{{ m.content }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
fewshot_split: train
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TASKS = {
    "choice": CHOICE,
    "begun": CHOICE + 'gen_prefix: "It is"\ndescription: "Choose."\n',
    "unasked": CHOICE.replace("{{question}}\\nAnswer:", ""),
    "next_word": """
output_type: loglikelihood
doc_to_text: "{{question}} "
doc_to_target: "{{choices[label]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["e", "the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "other_words": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "a"
generation_kwargs: {num_beams: 4}
metric_list: [{metric: exact_match}]
""",
    "far_away": CHOICE.replace("output_type", "dataset_path: nobody/nothing\noutput_type"),
}


@pytest.fixture(autouse=True)
def no_pool(monkeypatch):
    """For the library's own runs, too; and what ours set is gone afterwards."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files over local data: questions short and long, choices of one token and of many."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(5)

    def words(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    for split, count in (("train", 6), ("test", 7)):
        docs = [
            {
                "question": words(1, 4) if n % 3 else words(20, 40),
                "choices": ["a", "b", "c", "d"] if n % 2 else [words(1, 5) for _ in range(3)],
                "label": int(rng.integers(3)),
                "text": words(5, 80),
            }
            for n in range(count)
        ]
        (folder / f"{split}.json").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {folder}/train.json, "
    data += f"test: {folder}/test.json}}}}\n"
    for name, task in TASKS.items():
        head = f"task: {name}\ntest_split: test\ntraining_split: train\n"
        text = head + ("" if "dataset_path" in task else data) + task
        (folder / f"{name}.yaml").write_text(text)
    (folder / "both.yaml").write_text(
        "group: both\ntask: [choice, next_word]\naggregate_metric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory):
    """A checkpoint of ours, dense; and the same as Hugging Face's."""
    ours = save_model(data, tmp_path_factory.mktemp("ours"), max_length=LENGTH)
    theirs = tmp_path_factory.mktemp("theirs")
    write_huggingface(open_source(ours), theirs, None, lambda _: None)
    (theirs / "chat_template.jinja").write_text(TEMPLATE)
    return ours, theirs


def adapter(path, policy=None, add_bos=None, **options):
    """The model as the door makes it, and its engine."""
    model = open_model(path)
    text, policy = load_tokenizer_of(model, add_bos=add_bos), policy or Dense()

    def write(prompts, params):
        engine = Engine(
            *(model.params, model.config, text),
            policy=policy,
            max_sequences=3,
            kv_bytes=2**20,
        )
        for event in engine.stream(prompts, [SamplingParams(**each) for each in params]):
            if event.finish_reason:
                yield event.sequence, event.result

    return HarnessModel(
        *(model.params, model.config, text, policy),
        write=write,
        tokenizer_path=Path(model.tokenizer),
        **{"batch": 4} | options,
    )


def theirs_say(path, folder, names, num_fewshot, chat=False, **options):
    """What the library says by its own backend."""
    for library in ("torch", "transformers", "accelerate"):
        pytest.importorskip(library)
    from lm_eval.models.huggingface import HFLM

    model = HFLM(str(path), device="cpu", dtype="float32", batch_size=3, **options)
    return lm_eval.simple_evaluate(
        model,
        tasks=names,
        num_fewshot=num_fewshot,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )


def assert_same(ours, theirs):
    for name, figures in theirs.items():
        for key, value in figures.items():
            same = pytest.approx(value, rel=1e-4) if isinstance(value, float) else value
            assert ours[name][key] == same, (name, key)


ALL = ["choice", "unasked", "next_word", "whole_text", "written"]


@pytest.mark.parametrize("add_bos", [True, False])
def every_kind_of_task_gives_the_figures_of_the_librarys_own_backend_test(dense, folder, add_bos):
    ours, theirs = dense
    expected = theirs_say(theirs, folder, ALL, 2, add_bos_token=add_bos)
    model = adapter(ours, add_bos=add_bos)
    tasks = find_tasks(ALL, folder=folder, num_fewshot=2)
    found = run_tasks(model, tasks)
    assert_same(found["results"], expected["results"])
    assert found["n-shot"] == expected["n-shot"]
    assert model.tokens_per_slot == pytest.approx(1.0)
    for name, samples in expected["samples"].items():
        ours_of = sorted(tasks["tasks"][name].instances, key=lambda x: (x.doc_id, x.idx))
        theirs_of = [resp for sample in samples for resps in sample["resps"] for resp in resps]
        assert len(ours_of) == len(theirs_of) > 6
        for request, resp in zip(ours_of, theirs_of, strict=True):
            [said] = request.resps
            if isinstance(resp, tuple):
                assert said[0] == pytest.approx(resp[0], rel=1e-5, abs=1e-5)
                assert said[1] == resp[1]
            else:
                assert said == (resp if isinstance(resp, str) else pytest.approx(resp, rel=1e-5))
    texts = [request.resps[0] for request in tasks["tasks"]["written"].instances]
    assert len(set(texts)) > 2 and not any("e" in text for text in texts)


def conversations_are_those_of_the_librarys_own_backend_test(dense, folder):
    _, theirs = dense
    names = ["choice", "begun", "written"]
    expected = theirs_say(theirs, folder, names, 1, chat=True)
    tasks = find_tasks(names, folder=folder, num_fewshot=1)
    found = run_tasks(adapter(theirs), tasks, chat=True)
    assert_same(found["results"], expected["results"])
    for name in names:
        asked = {request.args[0] for request in tasks["tasks"][name].instances}
        wanted = {pair[0] for sample in expected["samples"][name] for pair in sample["arguments"]}
        assert asked == wanted and all("<|user|>" in text for text in asked)
    assert all(x.args[0].endswith("<|assistant|>It is") for x in tasks["tasks"]["begun"].instances)


def a_model_without_a_template_says_so_test(dense, folder):
    ours, _ = dense
    with pytest.raises(UserError, match="--apply_chat_template: there is none beside"):
        run_tasks(adapter(ours), find_tasks(["choice"], folder=folder), chat=True)


def a_policy_is_what_is_measured_test(dense, folder):
    """Token by token as every other measure of ours has it; and what the engine writes by it."""
    ours, _ = dense
    policy = TOVA(6)
    model, tasks = adapter(ours, policy), find_tasks(["whole_text", "written"], folder=folder)
    run_tasks(model, tasks)
    assert 2 < model.tokens_per_slot < LENGTH / 6
    plain, loaded = find_tasks(["whole_text", "written"], folder=folder), open_model(ours)
    run_tasks(adapter(ours), plain)
    text = load_tokenizer_of(loaded)
    apart = 0.0
    for request, other in zip(
        tasks["tasks"]["whole_text"].instances, plain["tasks"]["whole_text"].instances, strict=True
    ):
        ids = [text.bos_id, *encode_prompt(text, request.args[0])][: LENGTH + 1]
        some = {"tokens": ids[:-1], "targets": ids[1:], "positions": range(len(ids) - 1)}
        some = {name: np.array([x], np.int32) for name, x in some.items()}
        [nats] = measure(loaded.params, loaded.config, some, policy).nats
        if len(ids) <= LENGTH:  # else there are more windows
            assert request.resps[0] == pytest.approx(-nats.sum(), rel=1e-5)
        apart = max(apart, abs(request.resps[0] - other.resps[0]))
    assert apart > 0.1
    said = [x.resps[0] for x in tasks["tasks"]["written"].instances]
    assert said != [x.resps[0] for x in plain["tasks"]["written"].instances]


def examples_and_groups_are_as_they_were_asked_for_test(dense, folder, monkeypatch):
    ours, _ = dense
    manager = TaskManager(include_path=str(folder))  # it takes seconds to make
    monkeypatch.setattr(harness_tasks, "TaskManager", lambda **_: manager)
    alone = run_tasks(adapter(ours), find_tasks(["both"], folder=folder, num_fewshot=3), limit=2)
    assert set(alone["n-shot"].values()) == {3} and alone["groups"]["both"]["acc,none"] >= 0
    assert {x["effective"] for x in alone["n-samples"].values()} == {2}
    with pytest.raises(UserError, match="model_card have their own"):
        find_tasks(["model_card"], num_fewshot=3)
    assert set(MODEL_CARD) < set(manager.all_tasks)


def what_the_engine_cannot_do_is_refused_test(dense, folder):
    ours, _ = dense
    with pytest.raises(UserError, match="task other_words: its generation_kwargs have num_beams"):
        run_tasks(adapter(ours), find_tasks(["other_words"], folder=folder))
    with pytest.raises(UserError, match="write 12 tokens, and it knows texts of 8"):
        run_tasks(adapter(ours, max_length=8), find_tasks(["written"], folder=folder))
    with pytest.raises(UserError, match="--task_path: .*nowhere is no folder"):
        find_tasks(["choice"], folder=folder / "nowhere")


def draws_of_one_question_differ_test(dense, folder, tmp_path):
    ours, _ = dense
    task = (folder / "written.yaml").read_text().replace("do_sample: false", "temperature: 3.0")
    task = task.replace('until: ["e", "the"]', "until: []").replace("written", "drawn")
    (tmp_path / "drawn.yaml").write_text(task + "repeats: 4\n")
    tasks = find_tasks(["drawn"], folder=tmp_path)
    run_tasks(adapter(ours), tasks, limit=1)
    [request] = tasks["tasks"]["drawn"].instances
    assert len(set(request.resps)) == 4


def the_door_says_the_same_test(dense, folder):
    ours, _ = dense
    flags = f"--checkpoint={ours}", f"--task_path={folder}", "--tasks=choice,written"
    flags += "--policy=tova", "--budget=6", "--kv_bytes=1MiB", "--num_fewshot=1", "--limit=3"
    result, shown = runs_of("evaluate", [*flags, "--json"], flags, warnings="ignore")
    assert result.returncode == 0, result.stderr
    about = json.loads(result.stdout)
    model = adapter(ours, TOVA(6))
    tasks = find_tasks(["choice", "written"], folder=folder, num_fewshot=1)
    assert_same(about["tasks"]["results"], run_tasks(model, tasks, limit=3)["results"])
    assert about["ratio"] == pytest.approx(model.tokens_per_slot) and about["mode"] == "tova"
    assert shown.returncode == 0, shown.stderr
    assert f"{about['ratio']:.2f} tokens per slot" in shown.stdout
    assert re.search(r"^\|written *\|.*\|exact_match *\|", shown.stdout, re.M)


def what_cannot_be_is_refused_in_a_line_test(dense, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ours, _ = dense
    base = f"--checkpoint={ours}", f"--task_path={folder}"
    cases = [
        ([*base, "--tasks=far_away"], "the data of task far_away cannot be had"),
        ([*base, "--tasks=choise"], "there is no task choise: did you mean choice?"),
        ([*base, "--tasks=choice", "--windows=3"], "--windows is of text, not of --tasks"),
        ([*base, "--tasks=choice", "--length=65"], "--length: expected 2 to 64, what"),
        ([*base, "--tasks=choice", "--task_metadata=3"], "expected a JSON object, got 3"),
        ([*base[:1], "--limit=3"], "--limit goes with --tasks"),
        ([*base, "--tasks=written", "--kv_bytes=12kB"], "--kv_bytes=12kB: too few for a question"),
    ]
    results = runs_of("evaluate", *(flags for flags, _ in cases), warnings="ignore")
    for run, (_, complaint) in zip(results, cases, strict=True):
        lines = [line for line in run.stderr.splitlines() if line.startswith("error:")]
        assert run.returncode == 2 and len(lines) == 1 and complaint in lines[0], run.stderr
        assert "Traceback" not in run.stderr and run.stdout == ""
