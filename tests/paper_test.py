"""The paper's experiment: its configs, and a rehearsal of all of it at toy size."""

import itertools
import json
import pathlib
import sys

import pytest

from configs import paper
from experiments import paper as experiment
from mixcpt_jax import config, main
from mixcpt_jax.core.errors import InputError

EXAM = pathlib.Path(main.__file__).parent / "assets/general_exam.jsonl"
TASK = f"""
task: exam
dataset_path: json
dataset_kwargs:
  data_files:
    test: {EXAM}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@pytest.mark.parametrize("name", ["", *experiment.names()])
def test_arms_read_the_same_domain_tokens(name):
    made = paper.get_config(name)
    for phase in made.phases:
        config.check_values(config.for_phase(made, phase))
    cpt = config.for_phase(made, "cpt")
    weights = {n: source.weight for n, source in cpt.sources.items()}
    tokens = made.train.num_steps * made.data.batch_size * made.data.row_length
    domain_tokens = tokens * weights["domain"] / sum(weights.values())
    assert domain_tokens == pytest.approx(paper.DOMAIN_TOKENS, rel=1e-3)


def test_unknown_or_repeated_names_are_refused():
    for names in ("llama2_7b", "mixcpt,mixture", "wikipedia,starcoder,mixcpt"):
        with pytest.raises(InputError, match="no such variant"):
            paper.get_config(names)


def test_seventeen_tasks_of_seven_capabilities():
    tasks = list(itertools.chain(*experiment.CAPABILITIES.values()))
    assert (len(experiment.CAPABILITIES), len(tasks)) == (7, 17)
    assert len(set(tasks)) == 17
    lines = experiment.commands("gs://bucket/paper", "v5e-64")
    assert len(lines) == 2 * 4 * 3 * 3
    assert "llama3_8b,wikipedia,mixcpt,v5e-64" in lines[0]


def test_result_without_a_task_is_one_line(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / experiment.RESULTS_FILE).write_text('{"results": {}}')
    with pytest.raises(InputError, match="task mmlu has no acc,none"):
        experiment.table([str(tmp_path / "one")])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the harness
@pytest.mark.usefixtures("compiled_quickly")
def test_rehearsal(tiny_model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from mixcpt_jax.cli import lm_eval

    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/exam.yaml").write_text(TASK)
    folders = []
    for arm in ("mixcpt", "traditional"):
        made = paper.get_config(f"{arm},rehearsal")
        made.model.path = tiny_model
        if arm == "traditional":  # its later phases are those of the other arm
            made.phases = ("cpt", "select")
            for name in set(made.overrides) - set(made.phases):
                del made.overrides[name]
        folders.append(f"{tmp_path}/{arm}")
        main.run(made, folders[-1])
        monkeypatch.setattr(
            sys,
            "argv",
            [
                "lm-eval",
                f"--checkpoint={folders[-1]}",
                "--tasks=exam",
                f"--include_path={tmp_path}/tasks",
                f"--output={folders[-1]}/{experiment.RESULTS_FILE}",
            ],
        )
        lm_eval.main()
    text = experiment.table(folders, {"exam": {"exam": "acc,none"}})
    assert text.splitlines()[0].split("|")[2:4] == [" mixcpt ", " traditional "]
    for folder in folders:
        results = json.loads(pathlib.Path(folder, experiment.RESULTS_FILE).read_text())
        share = 100 * results["results"]["exam"]["acc,none"]
        assert f"{share:.1f}" in text
