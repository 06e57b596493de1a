"""Recipes compose: what merging means, what the fragments that come with the package are, and what users get wrong."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from command import run
from forked import Server, refuse
from hypothesis import given
from hypothesis import strategies as st

from trace_ds.cluster.job import ClusterSpec
from trace_ds.cluster.plan import plan
from trace_ds.config.compose import GROUPS, compose, fragment_of, merge, published_config, recipe_names, recipes
from trace_ds.config.load import dump_yaml, load_config
from trace_ds.config.schema import Config
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.evaluation.items import read_task
from trace_ds.evaluation.metrics import TASK_METRICS

ROOT = Path(__file__).resolve().parents[2]
TASKS, MODELS = recipe_names("task"), recipe_names("model")
PAIRS = list(itertools.product(TASKS, MODELS))
NODES = {"mixtral_8x7b": 2, "mixtral_8x7b_instruct": 2, "mixtral_8x22b": 8, "qwen3_235b_a22b": 8, "deepseek_v3": 32}

leaves = st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2)
keys = st.sampled_from("abc")
trees = st.recursive(leaves, lambda inner: st.dictionaries(keys, inner, max_size=3), max_leaves=8)
sections = st.dictionaries(keys, trees, max_size=3)


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return ...
        tree = tree[key]
    return tree


def paths(tree: Any, before: tuple[str, ...] = ()) -> set[tuple[str, ...]]:
    inner = [paths(value, (*before, key)) for key, value in tree.items()] if isinstance(tree, dict) else []
    return {before}.union(*inner)


@given(under=sections, over=sections)
def test_the_later_one_wins_key_by_key(under: dict[str, Any], over: dict[str, Any]) -> None:
    before = copy.deepcopy((under, over))
    merged = merge(under, over)
    assert (under, over) == before
    for path in paths(under) | paths(over):
        mine, theirs, result = at(over, path), at(under, path), at(merged, path)
        if isinstance(mine, dict):
            assert isinstance(result, dict)
        elif mine is not ...:
            assert result == mine
        elif all(isinstance(at(over, path[:n]), dict) or at(over, path[:n]) is ... for n in range(len(path))):
            assert result == theirs
        else:
            assert result is ...  # a section of `under` that `over` replaced by a value
    assert paths(merged) <= paths(under) | paths(over)


@given(a=sections, b=sections)
def test_what_is_merged_shares_nothing(a: dict[str, Any], b: dict[str, Any]) -> None:
    before = copy.deepcopy((a, b))
    _spoil(merge(a, b))
    assert (a, b) == before


def _spoil(tree: Any) -> None:
    if isinstance(tree, dict):
        for value in tree.values():
            _spoil(value)
        tree["spoiled"] = True
    elif isinstance(tree, list):
        tree.append("spoiled")


def write(path: Path, **values: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


def count_keys(node: dict[str, Any], definitions: dict[str, Any]) -> int:
    """Leaves of a JSON schema, those of sections in unions, lists and mappings included."""
    if "$ref" in node:
        return count_keys(definitions[node["$ref"].rpartition("/")[2]], definitions)
    if "properties" in node:
        return sum(count_keys(value, definitions) for value in node["properties"].values())
    inner = [*node.get("anyOf", ()), node.get("items"), node.get("additionalProperties")]
    sections = [each for each in inner if isinstance(each, dict) and "$ref" in each]
    return sum(count_keys(each, definitions) for each in sections) or 1


def test_the_configuration_has_at_most_130_keys() -> None:
    schema = Config.model_json_schema()
    assert count_keys(schema, schema["$defs"]) <= 130


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path, tiny_model)


def test_a_file_is_laid_over_what_it_extends_and_arguments_from_left_to_right(config: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "parts" / "first.yaml", unlearning={"steps": 1, "alpha": 2.0, "forget_rows": 3})
    write(tmp_path / "parts" / "second.yaml", extends="first.yaml", unlearning={"alpha": 4.0})
    mine = write(
        tmp_path / "mine.yaml",
        extends=["config.yaml", "parts/second.yaml"],
        name="mine",
        unlearning={"forget_rows": 5},
        data={"retain": [{"path": "${config_dir}/other.jsonl"}]},
    )
    loaded, run = load_config(mine)
    assert (run, loaded.unlearning.steps, loaded.unlearning.alpha, loaded.unlearning.forget_rows) == (
        *(Path("runs/mine"), 1, 4.0, 5),
    )
    assert [file.path for file in loaded.data.retain] == [f"{tmp_path}/other.jsonl"]  # a list is replaced
    assert loaded.data.forget == load_config(str(config))[0].data.forget
    assert "extends" not in dump_yaml(loaded)
    assert load_config([mine, first])[0].unlearning.alpha == 2
    assert load_config([first, mine])[0].unlearning.alpha == 4
    assert load_config([mine, first], ["unlearning.alpha=7.0"])[0].unlearning.alpha == 7
    (tmp_path / "stored.yaml").write_text(dump_yaml(loaded))
    assert load_config(str(tmp_path / "stored.yaml"))[0] == loaded


def test_a_file_of_a_recipes_name_goes_before_it(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").write_text(f"extends: {config}\nname: here\n")
    assert load_config("demo")[0].name == "here"


def test_names_are_of_one_kind_only() -> None:
    names = [name for kind in GROUPS for name in recipe_names(kind)]
    assert len(set(names)) == len(names) == len(recipes())


@pytest.mark.parametrize(("task", "model"), PAIRS)
def test_a_task_and_a_model_make_a_run_that_can_be_planned(task: str, model: str, tmp_path: Path) -> None:
    loaded, run = load_config([task, model])
    assert loaded.name == f"{task}-{model}" and run == Path("runs") / loaded.name
    swapped = load_config([model, task])
    assert (loaded, run) == swapped
    assert load_config(write(tmp_path / "mine.yaml", extends=[model, task])) == swapped
    planned = plan(loaded, ClusterSpec(nodes=NODES.get(model, 1)))
    assert not [text for text in planned.warnings if text.startswith("evaluate needs ")]
    assert all(stage.fits for stage in planned.stages.values()), planned.warnings


@pytest.mark.parametrize("model", MODELS)
def test_the_published_configuration_of_a_model(model: str) -> None:
    """What it says is trained exists, and its layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = published_config(model)
    raw = compose([model]).raw
    assert fragment_of(raw["model"]["path"]) == fragment_of(raw["model"]["path"] + "@main") == model
    assert values["num_hidden_layers"] > raw["unlearning"]["rmu"]["layer"] == 7
    short = AutoConfig.for_model(**values | {"num_hidden_layers": 8})
    with torch.device("meta"):
        names = [name for name, _ in AutoModelForCausalLM.from_config(short).named_parameters()]
    for pattern in raw["unlearning"]["trainable"]:
        assert len(fnmatch.filter(names, pattern)) == 2, pattern  # gate and up in one tensor, down


def refused(configs: list[str], *changes: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(configs, changes)
    line = error.value.line()
    assert "\n" not in line and len(line) < 700
    return line


@pytest.mark.parametrize(
    ("configs", "messages"),
    [
        (["wmdp_cyber"], ["model.path is missing", "mixtral_8x7b", "--set model.path="]),
        (["olmoe_1b_7b"], ["data.forget and data.retain are missing", "wmdp_cyber"]),
        (["wmdp_cyber", "wmdp_bio"], ["one task, and two are named", "wmdp_cyber and wmdp_bio"]),
        (["olmoe_1b_7b", "wmdp_cyber", "mixtral_8x7b"], ["one model, and two are named"]),
        (["wmdp_cyber", "demo"], ["demo: this recipe is a whole run, neither a model nor a task", "olmoe_1b_7b"]),
        (["wmdp_cyber", "olmo_1b_7b"], ["olmo_1b_7b: no such configuration file", "did you mean 'olmoe_1b_7b'"]),
        (["wmdp_cyb", "olmoe_1b_7b"], ["did you mean 'wmdp_cyber'"]),
        (
            [str(GROUPS["task"] / "wmdp_cyper.yaml")],
            ["did you mean '/", "wmdp_cyber.yaml'", "… and 1 more; `trace-ds rec"],
        ),
    ],
)
def test_fragments_that_make_no_run(configs: list[str], messages: list[str]) -> None:
    line = refused(configs)
    assert all(message in line for message in messages), line


def test_extends_that_leads_nowhere(config: Path, tmp_path: Path) -> None:
    for value, message in [
        ("nowhere.yaml", "nowhere.yaml: no such configuration file or recipe"),
        (7, "extends is no name or path"),
        ([""], "extends is no name or path"),
        ({"a": "b"}, "extends is no name or path"),
        ("a.yaml", "extends refers back to itself"),
        ("back.yaml", "extends refers back to itself"),
        ("config.yaml/..", "no such configuration file"),
        (["wmdp_cyber", "parts.yaml"], "wmdp_cyber and wmdp_bio"),
        (["config.yaml", "broken.yaml"], "broken.yaml: not valid YAML in line 1"),
        (["config.yaml", "list.yaml"], "list.yaml: the file holds no keys"),
    ]:
        write(tmp_path / "back.yaml", extends="./a.yaml")
        write(tmp_path / "parts.yaml", extends="wmdp_bio")
        (tmp_path / "broken.yaml").write_text("a: [")
        (tmp_path / "list.yaml").write_text("- a\n")
        assert message in refused([write(tmp_path / "a.yaml", extends=value)]), value
    for number in range(101):
        write(tmp_path / f"n{number}.yaml", extends=[f"n{number + 1}.yaml"] * 2)
    write(tmp_path / "n101.yaml", name="x")
    assert "too many files" in refused([str(tmp_path / "n0.yaml")])


def test_the_list_is_in_groups_and_80_columns_wide(capsys: pytest.CaptureFixture[str]) -> None:
    from trace_ds.cli import app

    app(["recipes"], standalone_mode=False)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    places = [text.index(f" {name} ") for kind in ("task", "model", "run") for name in recipe_names(kind)]
    assert places == sorted(places)
    app(["recipes", "--show", "olmoe_1b_7b"], standalone_mode=False)
    assert capsys.readouterr().out == (GROUPS["model"] / "olmoe_1b_7b.yaml").read_text()


@pytest.mark.parametrize("verb", ["prepare", "collect", "unlearn", "convert", "evaluate", "report", "run"])
def test_every_verb_takes_a_task_and_a_model(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from trace_ds.cli import app

    app([verb, "olmoe_1b_7b", "wmdp_cyber", "--dry-run", "--run-dir", str(tmp_path / "run")], standalone_mode=False)
    said = capsys.readouterr().out
    assert "\nname: wmdp_cyber-olmoe_1b_7b\n" in said and "path: allenai/OLMoE-1B-7B-0924\n" in said
    assert not (tmp_path / "run").exists()


def test_a_run_trains_one_model_unless_variants_are_chosen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line of `run --dry-run` and of `plan` says how many jobs, how long and how much storage."""
    from trace_ds.cli import app

    monkeypatch.chdir(tmp_path)
    for verb in (["run", "--dry-run"], ["plan"]):
        lines = []
        for chosen in ("", "npo,uniform", "all"):
            with contextlib.suppress(SystemExit):
                app([*verb, "wmdp_cyber", "olmoe_1b_7b", f"--variants={chosen}"], standalone_mode=False)
            lines.append(capsys.readouterr().out.splitlines()[0].removeprefix("# "))
        jobs, times, sizes = zip(*(line.split("; ") for line in lines), strict=True)
        assert jobs == (
            "1 training job (6 more with --variants all)",
            "3 training jobs (4 more with --variants all)",
            "7 training jobs",
        )
        assert all(re.fullmatch(r"at least [\d.]+ (s|min) on 1 x 8 GPUs of 80 GB", each) for each in times)
        assert sorted(sizes, key=lambda each: float(each.removesuffix(" TB"))) == [*sizes] and len({*sizes}) == 3


def test_what_makes_no_run_is_refused_before_anything_is_written(tmp_path: Path, server: Server) -> None:
    for words in (("wmdp_cyber", "olmo_1b_7b"), ("wmdp_cyber",), ("muse_books", "muse_news", "olmoe_1b_7b")):
        for verb in ("run", "plan"):
            assert "Fix: " in refuse(server, tmp_path, verb, *words)


def test_slurm_names_the_run_as_the_command_does(tmp_path: Path) -> None:
    script = (ROOT / "slurm" / "common.sh").read_text(encoding="utf-8")
    function = script[script.index("config_name() {") :].partition("\n}\n")[0] + "\n}\n"
    write(tmp_path / "mine.yaml", extends="demo", name="of_mine")
    for words, name in [
        (["wmdp_cyber", "olmoe_1b_7b", "--set", "seed=1"], "wmdp_cyber-olmoe_1b_7b"),
        (["olmoe_1b_7b", "wmdp_cyber"], "wmdp_cyber-olmoe_1b_7b"),
        (["demo"], "demo"),
        (["mine.yaml", "--set", "demo"], "of_mine"),
        (["wmdp_cyber", "olmoe_1b_7b", "mine.yaml"], "of_mine"),
    ]:
        body = f'set -euo pipefail; TRACE_DS_HOME=$1; config=$2; arguments=("${{@:3}}")\n{function}config_name'
        result = run(["bash", "-c", body, "bash", str(ROOT), *words], cwd=tmp_path)
        assert (result.returncode, result.stdout.strip()) == (0, name), result.stderr


HEADLINES = {
    **{
        f"tofu_forget{share}": ["tofu_forget forget_quality", "tofu_retain model_utility"]
        for share in ("01", "05", "10")
    },
    "wmdp_bio": ["wmdp_bio acc", "mmlu acc"],
    "wmdp_cyber": ["wmdp_cyber acc", "mmlu acc"],
    **{
        name: ["verbmem rouge_l", "knowmem rouge_l", "privleak priv_leak", "knowmem_retain rouge_l"]
        for name in ("muse_books", "muse_news", "muse_news_scal", "muse_news_sust")
    },
}


@pytest.mark.parametrize("task", TASKS)
def test_a_benchmark_is_headed_by_its_authors_metrics(task: str, tmp_path: Path) -> None:
    """No score twice: MMLU's average holds its subjects."""
    config, _ = load_config(task, ["model.path=x"], tmp_path)
    named = [(one.name, one.headline) for one in config.evaluation.tasks if one.headline]
    assert [" ".join(pair) for pair in named] == HEADLINES[task]
    assert all(one.headline in (None, *TASK_METRICS[one.type]) for one in config.evaluation.tasks)


def test_a_headline_that_the_task_does_not_have_is_refused() -> None:
    task = TaskConfig(name="a", type="tofu", path="a", role="forget", headline="acc")
    with pytest.raises(UserError, match="task a: a tofu task has no metric 'acc'"):
        read_task(task)


@pytest.mark.parametrize("recipe", ["demo", "demo_verbatim"])
def test_the_demo_is_scored_near_where_it_forgets(recipe: str, tmp_path: Path) -> None:
    """Nothing between two scored steps is told, so no two are farther apart than an eighth of the job."""
    config, _ = load_config(recipe, [], tmp_path)
    evaluate, roles = config.unlearning.evaluate, {one.name: one.role for one in config.evaluation.tasks}
    assert evaluate.every is not None and evaluate.every * 8 <= config.unlearning.steps
    assert {roles[name] for name in evaluate.tasks} == {"forget", "utility"}
